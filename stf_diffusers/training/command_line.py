"""What a script owes its user: a mistake is one line and exit code 2, a defect keeps its traceback."""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

PACKAGE = Path(__file__).resolve().parents[1]

# A user's mistake; a run that could not go on, which says why; Ctrl-C, as shells report it.
MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`, and say what its user has to do in one line on stderr.

    An error that this package or the script raises itself is a sentence for the user. Any other is a defect, of ours or of
    a library, and leaves its traceback.

    Raises:
        SystemExit: 2 after a ValueError or TypeError that is explained, 1 after another such error, 130 after Ctrl-C.
    """
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if not explained(error):
            raise
        rank = os.environ.get("RANK", "0")
        who = Path(sys.argv[0]).stem + (f" (process {rank})" if os.environ.get("WORLD_SIZE", "1") != "1" else "")
        print(f"{who}: error: {error}", file=sys.stderr)
        raise SystemExit(MISTAKE if isinstance(error, ValueError | TypeError) else FAILURE) from None


def explained(error: BaseException) -> bool:
    """Whether an error was raised by a `raise` statement of this package or of the running script."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    # A sum of the wrong shapes, say, raises a ValueError too, but not by a statement.
    by_statement = dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return by_statement and _is_ours(trace.tb_frame)


def _is_ours(frame: FrameType) -> bool:
    script = getattr(sys.modules["__main__"], "__file__", None)
    path = Path(frame.f_code.co_filename).resolve()
    return path.is_relative_to(PACKAGE) or (script is not None and path == Path(script).resolve())
