"""A local server that speaks as much of the Hub's API as pushing and loading models and data sets needs."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What stands before a repository's name in addresses of the API ("models/", "datasets/") and of files ("", "datasets/").
API = r"/api/(models/|datasets/)([^/]+(?:/[^/]+)??)"


class Hub:
    """Repositories in memory.

    `files[repository][path]` is the content, where data sets are named "datasets/user/name"; `commits` are the
    (repository, message) pairs, `stored` the contents in large file storage by their SHA-256, `moved` the new names of
    repositories that were renamed.
    """

    def __init__(self, token: str = "hf_secret") -> None:
        self.token = token
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[tuple[str, str]] = []
        self.requests: list[tuple[str, str]] = []
        self.stored: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        # Statuses to answer the next requests to "create", "commit" or "store" with; 0 cuts the connection, "silence"
        # leaves it open without an answer until the event of that name.
        self.faults: dict[str, list[int | str]] = {}
        self.silence = threading.Event()
        # The status with which each request for a repository is answered.
        self.broken: dict[str, int | str] = {}

    def revision(self, repository: str) -> str:
        return hashlib.sha1(repr(sorted(self.files[repository].items())).encode()).hexdigest()


class Server(ThreadingHTTPServer):
    """A server of one hub."""

    hub: Hub


class Handler(BaseHTTPRequestHandler):
    """Answers requests to the self.server.hub of its server."""

    server: "Server"
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def reply(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.reply(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def failed(self, kind: str) -> bool:
        """Answer with the next injected fault of this kind, if there is one."""
        if self.server.hub.faults.get(kind):
            self.fail(self.server.hub.faults[kind].pop(0))
            return True
        return False

    def fail(self, status: int | str) -> None:
        if isinstance(status, str):  # "silence"
            self.server.hub.silence.wait()
            self.close_connection = True
        elif status == 0:
            self.close_connection = True
            self.connection.close()
        else:
            self.refuse(status, "Injected", f"injected fault {status}")

    def redirected(self, prefix: str, name: str) -> bool:
        """Send the client on where the repository has another name by now."""
        if name not in self.server.hub.moved:
            return False
        self.reply(307, Location=self.path.replace(f"{prefix}{name}", f"{prefix}{self.server.hub.moved[name]}", 1))
        return True

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_PUT(self) -> None:
        body = self.body()
        self.server.hub.requests.append((self.command, self.path))
        if self.failed("store"):
            return None
        oid = self.path.rsplit("/", 1)[1]
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400, "BadDigest", "content does not match its digest")
        self.server.hub.stored[oid] = body
        return self.reply(200)

    def do_POST(self) -> None:
        body = self.body()
        self.server.hub.requests.append((self.command, self.path))
        path = self.path.split("?")[0]
        if match := re.fullmatch(f"{API}/paths-info/[^/]+", path):
            prefix, name = match[1], match[2]
            if self.redirected(prefix, name):
                return None
            files = self.server.hub.files.get(prefix.replace("models/", "") + name, {})
            wanted = re.findall(r"paths=([^&]+)", body.decode()) or json.loads(body)["paths"]
            return self.reply(200, [self.entry(each, files[each]) for each in wanted if each in files])
        if self.headers.get("Authorization") != f"Bearer {self.server.hub.token}":
            return self.refuse(401, "Unauthorized", "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            if self.failed("create"):
                return None
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'somebody'}/{wanted['name']}"
            if name in self.server.hub.files:
                return self.reply(409, {"error": "exists", "url": f"{self.address}/{name}"})
            self.server.hub.files[name], self.server.hub.private[name] = (
                {},
                wanted.get("private") or wanted.get("visibility") == "private",
            )
            return self.reply(200, {"url": f"{self.address}/{name}", "id": name, "name": name})
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/\w+", path):
            # As the Hub does: weights and pictures go to large file storage.
            modes = {True: "lfs", False: "regular"}
            answer = [
                {
                    "path": file["path"],
                    "uploadMode": modes[file["path"].endswith((".safetensors", ".png"))],
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": answer})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [{"oid": each["oid"], "size": each["size"]} for each in json.loads(body)["objects"]]
            for each in objects:
                if each["oid"] not in self.server.hub.stored:
                    each["actions"] = {"upload": {"href": f"{self.address}/storage/{each['oid']}", "header": {}}}
            return self.reply(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/\w+", path):
            if self.failed("commit"):
                return None
            return self.commit(match[1], body)
        return self.refuse(404, "EntryNotFound", path)

    def commit(self, repository: str, body: bytes) -> None:
        added: dict[str, bytes] = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] not in self.server.hub.stored:
                return self.refuse(400, "LfsMissing", f"{value['path']} was not uploaded")
            else:
                added[value["path"]] = self.server.hub.stored[value["oid"]]
        self.server.hub.files[repository] |= added
        self.server.hub.commits.append((repository, message))
        oid = self.server.hub.revision(repository)
        url = f"{self.address}/{repository}/commit/{oid}"
        return self.reply(200, {"success": True, "commitOid": oid, "commitUrl": url})

    @staticmethod
    def entry(path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def do_GET(self) -> None:
        self.server.hub.requests.append((self.command, self.path))
        path = self.path.split("?")[0]
        for name, status in self.server.hub.broken.items():
            if name in path:
                return self.fail(status)
        if match := re.fullmatch(f"{API}(/revision/[^/]+|/tree/[^/]+(?:/(.*))?)?", path):
            prefix, name, what, folder = match.groups()
            if self.redirected(prefix, name):
                return None
            return self.describe(prefix.replace("models/", ""), name, what or "", folder or "")
        if match := re.fullmatch(r"/(datasets/)?([^/]+(?:/[^/]+)??)/resolve/[^/]+/(.+)", path):
            prefix, name, file = match[1] or "", match[2], match[3]
            if self.redirected(prefix, name):
                return None
            content = self.server.hub.files.get(prefix + name, {}).get(file)
            if content is None:
                return self.refuse(404, "EntryNotFound", f"{file} not found")
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.reply(200, content, X_Repo_Commit=self.server.hub.revision(prefix + name), ETag=etag)
        return self.refuse(404, "EntryNotFound", path)

    do_HEAD = do_GET

    def describe(self, prefix: str, name: str, what: str, folder: str) -> None:
        files = self.server.hub.files.get(prefix + name)
        if files is None:
            return self.refuse(404, "RepoNotFound", f"{prefix}{name} not found")
        if what.startswith("/tree/"):
            inside = {path: content for path, content in files.items() if path.startswith(folder)}
            directories = {path.rsplit("/", 1)[0] for path in inside if "/" in path} - {folder}
            tree = [{"type": "directory", "path": each, "size": 0, "oid": "0" * 40} for each in sorted(directories)]
            return self.reply(200, tree + [self.entry(*each) for each in inside.items()])
        info = {
            "_id": "0", "id": name, "modelId": name, "sha": self.server.hub.revision(prefix + name), "tags": [],
            "private": self.server.hub.private.get(prefix + name, False), "siblings": [{"rfilename": path} for path in files],
        }  # fmt: skip
        return self.reply(200, info)


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Serve `hub` on a free local port; yields its address."""
    server = Server(("127.0.0.1", 0), Handler)
    server.hub = hub
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
