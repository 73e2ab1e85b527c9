"""A local server that speaks as much of the Hub's API as `huggingface_hub` needs to push and load a repository."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Repositories in memory: `files[repository][path]` is the content, `commits` the (repository, message) pairs."""

    def __init__(self, token="hf_secret"):
        self.token = token
        self.files, self.private, self.commits, self.requests = {}, {}, [], []
        # Statuses to answer commits with before they are taken; 0 cuts the connection.
        self.faults = []

    def revision(self, repository):
        return hashlib.sha1(repr(sorted(self.files[repository].items())).encode()).hexdigest()


def handler_for(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def reply(self, status, body=b"", **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status, code, message):
            self.reply(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.requests.append((self.command, self.path))
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.refuse(401, "Unauthorized", "Invalid credentials in Authorization header")
            if self.path == "/api/repos/create":
                wanted = json.loads(body)
                name = f"{wanted.get('organization') or 'somebody'}/{wanted['name']}"
                if name in hub.files:
                    return self.reply(409, {"error": "exists", "url": f"http://{self.headers['Host']}/{name}"})
                hub.files[name], hub.private[name] = {}, wanted.get("private") or wanted.get("visibility") == "private"
                return self.reply(200, {"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})
            if self.path == "/api/validate-yaml":
                return self.reply(200, {"errors": [], "warnings": []})
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/\w+", self.path):
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self.reply(200, {"files": files})
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/\w+", self.path):
                repository = match[1]
                if hub.faults:
                    status = hub.faults.pop(0)
                    if status == 0:
                        self.close_connection = True
                        return self.connection.close()
                    return self.refuse(status, "Injected", f"injected fault {status}")
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "header":
                        hub.commits.append((repository, entry["value"]["summary"]))
                    elif entry["key"] == "file":
                        hub.files[repository][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                oid = hub.revision(repository)
                url = f"http://{self.headers['Host']}/{repository}/commit/{oid}"
                return self.reply(200, {"success": True, "commitOid": oid, "commitUrl": url})
            return self.refuse(404, "EntryNotFound", self.path)

        def do_GET(self):
            hub.requests.append((self.command, self.path))
            path = self.path.split("?")[0]
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+|/tree/\w+)?", path):
                repository = match[1]
                if repository not in hub.files:
                    return self.refuse(404, "RepoNotFound", f"{repository} not found")
                files = hub.files[repository]
                if (match[2] or "").startswith("/tree/"):
                    tree = [
                        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for name, content in files.items()
                    ]
                    return self.reply(200, tree)
                info = {
                    "id": repository, "modelId": repository, "sha": hub.revision(repository), "tags": [],
                    "private": hub.private[repository], "siblings": [{"rfilename": name} for name in files],
                }  # fmt: skip
                return self.reply(200, info)
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path):
                content = hub.files.get(match[1], {}).get(match[2])
                if content is None:
                    return self.refuse(404, "EntryNotFound", f"{match[2]} not found")
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                return self.reply(200, content, X_Repo_Commit=hub.revision(match[1]), ETag=etag)
            return self.refuse(404, "EntryNotFound", path)

        do_HEAD = do_GET

    return Handler


@contextmanager
def serve(hub):
    """Serve `hub` on a free local port; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
