"""What a script owes its user: a mistake is one line and exit code 2, a defect keeps its traceback."""

from __future__ import annotations

import argparse
import dis
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

# What this package raises to tell its user something.
KINDS = (ValueError, TypeError, OSError, FloatingPointError, RuntimeError, ImportError)
PACKAGE = Path(__file__).resolve().parents[1]

# A user's mistake; a run that could not go on, which says why; Ctrl-C, as shells report it.
MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage, which lists every flag: `--help` does."""

    def error(self, message: str) -> NoReturn:
        """End the program with this message and exit code 2."""
        self.exit(MISTAKE, f"{Path(self.prog).stem}: error: {message}\n")


def run(main: Callable[..., None], *arguments: Any) -> None:
    """Run a script's `main` with these arguments, and say what its user has to do in one line on stderr.

    An error that this package or the script raises itself is a sentence for the user. Any other is a defect, of ours or of
    a library, and leaves its traceback.

    Raises:
        SystemExit: 2 after a ValueError or TypeError that is explained, 1 after another such error, 130 after Ctrl-C.
    """
    try:
        main(*arguments)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if not explained(error, Path(main.__code__.co_filename)):
            raise
        rank = os.environ.get("RANK", "0")
        who = Path(main.__code__.co_filename).stem + (
            f" (process {rank})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        )
        print(f"{who}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(MISTAKE if isinstance(error, ValueError | TypeError) else FAILURE) from None


def explained(error: BaseException, script: Path | None = None) -> bool:
    """Whether an error was raised by a `raise` statement of this package or of the script in this file."""
    trace = error.__traceback__
    if trace is None or not isinstance(error, KINDS):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    # A sum of the wrong shapes, say, raises a ValueError too, but not by a statement.
    by_statement = dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    path = Path(trace.tb_frame.f_code.co_filename).resolve()
    ours = path.is_relative_to(PACKAGE) or (script is not None and path == script.resolve())
    return by_statement and ours


@contextmanager
def errors_in_flags(
    parser_names: Collection[str], aliases: Mapping[str, str] | None = None, printed: Collection[str] = ()
) -> Iterator[None]:
    """Errors in the block name the script's flags where the package names its arguments.

    Args:
        parser_names: the script's flags, without dashes.
        aliases: the flag that an argument of another name comes from.
        printed: flags that are left as they are where a number follows: parameters of an object as it prints itself.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (in_flags(error.args[0], parser_names, aliases or {}, printed),)
        raise


def in_flags(
    message: str, parser_names: Collection[str], aliases: Mapping[str, str], printed: Collection[str] = ()
) -> str:
    """A message in a script's words: ``resolution=32`` becomes ``--resolution 32``. Arguments as for `errors_in_flags`."""
    names = "|".join(map(re.escape, {**dict.fromkeys(aliases), **dict.fromkeys(parser_names)}))

    def flag(match: re.Match[str]) -> str:
        given = match[2] or ""
        value = given[1:-1].replace(",", "") if given.startswith("(") else given.strip("'\"")
        if match[1] in printed and value and "'" not in given:
            return match[0]
        # A flag that is on or off has no value on the command line.
        return f"--{aliases.get(match[1], match[1])}" + (f" {value}" if value not in ("", "True") else "")

    return re.sub(rf"(?<![\w/-])({names})=(\([^)]*\)|'[^']*'|\"[^\"]*\"|[\w./+-]*\w)?", flag, message)
