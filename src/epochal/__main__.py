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

from epochal.cli import application
from epochal.errors import EpochalError
from epochal.runtime.launched import follow, tell

UNEXPECTED = """\
epochal met an error that it did not expect. Unless its last line tells you what to mend, this is a bug in epochal:
please report it together with the command and the text above."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, results to stdout and all else to stderr, and gives its exit code."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    told = "--traceback" in tokens or os.environ.get("EPOCHAL_TRACEBACK") == "1"
    follow()
    try:
        _run([token for token in tokens if token != "--traceback"])
        sys.stdout.flush()
    except (KeyboardInterrupt, Exception) as error:
        text, code = _explained(error, told)
        tell(error, text, code)
        return code
    return 0


def _explained(error: BaseException, told: bool) -> tuple[str, int]:
    """What to say of an error, and the exit code. told: with the way there."""
    if isinstance(error, KeyboardInterrupt):
        return "; ".join(["interrupted", *getattr(error, "__notes__", ())]), 130
    if isinstance(error, EpochalError):
        way = traceback.format_exception(error.__cause__ or error) if told else []
        return "".join([*way, error.describe()]), error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):  # stdout's: a file's is a FileError
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # of `epochal runs ls | head -1`, say: nobody reads on
            return "", 141
        return f"FileError: stdout cannot be written: {error.strerror}.", 1
    return "".join([*traceback.format_exception(error), UNEXPECTED]), 1


def _run(tokens: list[str]) -> None:
    from cyclopts import CycloptsError

    from epochal.errors import PlanError

    try:
        application(tokens)(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        recipe = [token for token in tokens[1:2] if token.endswith(".py")]
        command = " ".join(["epochal", *(error.command_chain or ()), *recipe])
        fix = f"{command} --help shows what can be given"
        if recipe and (option := _option(error)):
            fix = f"--set {option}=... changes the plan; {fix}"
        raise PlanError(str(error), where=command, fix=fix) from None


def _option(error: Exception) -> str | None:
    """The option of a plan that was given as a flag which does not exist."""
    from epochal.plan import Plan

    flag = getattr(getattr(error, "token", None), "keyword", None) or ""
    name = flag.partition("=")[0].lstrip("-").replace("-", "_")
    return name if name in Plan.__dataclass_fields__ else None


if __name__ == "__main__":
    sys.exit(main())
