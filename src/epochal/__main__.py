"""``epochal`` and ``python -m epochal``: from the command line to an exit code.

0: done, early stopping too. 1: an error. 2: a mistake in the command or the plan. 3: a value that is not finite.
130: interrupted. 141: the reader of stdout went away.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from epochal.cli import application
from epochal.errors import EpochalError

UNEXPECTED = """\
epochal met an error that it did not expect. Unless its last line tells you what to mend, this is a bug in epochal:
please report it together with the command and the text above."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, results to stdout and all else to stderr, and gives its exit code."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    told = "--traceback" in tokens or os.environ.get("EPOCHAL_TRACEBACK") == "1"
    try:
        _run([token for token in tokens if token != "--traceback"])
        sys.stdout.flush()
    except BrokenPipeError:  # of `epochal runs ls | head -1`, say: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as error:
        print("; ".join(["interrupted", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return 130
    except EpochalError as error:
        if told:
            traceback.print_exception(error.__cause__ or error)
        with suppress(OSError):  # a terminal that was closed
            print(error.describe(), file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # stdout's: a file's is a FileError
            print(f"FileError: stdout cannot be written: {error.strerror}.", file=sys.stderr)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        traceback.print_exc()
        print(UNEXPECTED, file=sys.stderr)
        return 1
    return 0


def _run(tokens: list[str]) -> None:
    from cyclopts import CycloptsError

    from epochal.errors import PlanError

    try:
        application(tokens)(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        recipe = [token for token in tokens[1:2] if token.endswith(".py")]
        command = " ".join(["epochal", *(error.command_chain or ()), *recipe])
        raise PlanError(str(error), where=command, fix=f"{command} --help shows what can be given") from None


if __name__ == "__main__":
    sys.exit(main())
