"""``epochal resume RUN``: the command that began a run, once more, from its newest checkpoint."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import CycloptsError, Parameter
from msgspec import Struct

from epochal.checkpoint import files
from epochal.cli import application
from epochal.cli.folders import existing
from epochal.cli.options import Again, Restarts, read_flags
from epochal.cli.train import Set
from epochal.cli.training import FLAGS
from epochal.errors import PlanError, RunFolderError
from epochal.runtime.launched import notes
from epochal.runtime.world import announced

DONE = {"epochs", "max_steps", "max_time", "early_stopping", "asked"}  # reasons that are an end, not a break


def resume(
    run: Annotated[Path, Parameter(help="The run folder.")],
    /,
    *,
    epochs: Annotated[int | None, Parameter(help="Train until so many are done in all; else as it was begun.")] = None,
    changes: Set = [],  # noqa: B006  (it is only read)
    processes: Again = None,
    restarts: Restarts = None,
) -> None:
    """Go on with an interrupted run, or train one further.

    It continues from its newest checkpoint that is whole, with the flags that it was begun with; the recipe or table is
    read where it was. A run that has ended is left as it is, unless --epochs or --set ask for more; --set changes the
    plan of a recipe, as in train.
    """
    facts = _facts(run)
    words, done = _command(run, facts.command), facts.epochs or 0
    if facts.status == "ended" and facts.reason in DONE and (epochs is None or epochs <= done) and not changes:
        print(f"{run} has ended, after epoch {done}: {facts.message}", file=sys.stderr)
        further = f"epochal resume {shlex.quote(str(run))} --epochs N trains until N epochs are done"
        print(f"{further}; {done} are" if epochs is not None else further, file=sys.stderr)
        return
    flags = run / FLAGS[words[0]]
    tokens = [*words, *(["--config", str(flags)] if flags.exists() else []), "--run", str(run), "--resume"]
    if announced().size > 1 and notes() is None:  # whoever started these processes has decided
        processes, restarts = processes or announced().size, restarts or 0
    elif processes == 1:
        restarts = restarts or 0  # those it was begun with are for several
    for name, value in {"epochs": epochs, "processes": processes, "restarts": restarts}.items():
        tokens += [] if value is None else [f"--{name}", str(value)]
    if changes and words[0] != "train":
        fix = f"leave it out; {flags} holds the flags that the run was begun with"
        raise PlanError("--set changes the plan of a recipe, and this run has none.", where=str(run), fix=fix)
    before = read_flags(flags).get("set", []) if flags.exists() else []
    if epochs is not None and any(re.match(r"\s*epochs\s*=", change) for change in (*before, *changes)):
        changes = [*changes, f"epochs={epochs}"]  # a change of the plan has the last word
    tokens += [word for change in changes for word in ("--set", change)]  # after those of the file
    # What the environment said when the run was begun stands in the file; what it says now is not asked.
    app = application(tokens, environment=False)
    try:
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        fix = f"what the run was begun with stands in {flags}: change there what the recipe calls otherwise now"
        raise PlanError(str(error), where=str(run), fix=fix) from None


class Facts(Struct):
    """What ``run.json`` tells of a run; anything else in it does not matter here."""

    status: str
    reason: str | None = None
    message: str | None = None
    epochs: int | None = None
    command: list[str] | None = None


def _facts(run: Path) -> Facts:
    """Raises RunFolderError if it is no run's folder."""
    if run.is_file():
        fix = "name the folder of a run; epochal import-checkpoint FILE.pt RUN makes one of weights alone"
        raise RunFolderError("it is a file, and not a run folder.", where=str(run), fix=fix)
    try:
        facts = msgspec.json.decode(files.read(existing(run) / "run.json"), type=Facts)
    except FileNotFoundError:
        what = "there is no run in the folder: it holds no run.json."
        raise RunFolderError(what, where=str(run), fix="name the folder of a run; epochal runs ls lists them") from None
    except (OSError, ValueError) as error:
        what, fix = f"its run.json cannot be read: {error}.", "copy it from a backup; nothing else is touched"
        raise RunFolderError(what, where=str(run / "run.json"), fix=fix) from error
    if facts.status == "imported":
        fix = f"begin one with them: epochal train RECIPE.py --run {shlex.quote(str(run))} --resume"
        raise RunFolderError("it holds imported weights, and no run yet.", where=str(run), fix=fix)
    return facts


def _command(run: Path, words: list[str] | None) -> list[str]:
    """The words that began the run. Raises RunFolderError if there are none, or if its table is not there any more."""
    if not words:
        what, fix = "the run was begun by a script, not by a command.", "call fit as it was called then, with"
        raise RunFolderError(what, where=str(run), fix=f"{fix} run={str(run)!r}, resume=True")
    if words[0] not in FLAGS or len(words) != (1 if words[0] == "demo" else 2):
        what = f"it was begun by a command that is not known: {' '.join(words)}."
        raise RunFolderError(what, where=str(run), fix="copy run.json from a backup")
    if words[0] == "fit" and not Path(words[1]).is_file():
        fix = f"put it back, or say where it is: epochal fit TABLE --config {run}/fit.toml --run {run} --resume"
        raise RunFolderError("the table that the run was begun with is not there.", where=words[1], fix=fix)
    return ["train", str(_recipe(Path(words[1]), run / "recipe.py"))] if words[0] == "train" else words


def _recipe(original: Path, copy: Path) -> Path:
    """The recipe where it was, for what it imports lies beside it; the copy in the run folder if it is gone."""
    if not original.is_file():
        print(f"{original} is gone: the run goes on with its copy, {copy}", file=sys.stderr)
        return copy
    if copy.is_file() and copy.read_bytes() != original.read_bytes():
        print(f"{original} has changed since the run was begun (as {copy}): it goes on as it is now", file=sys.stderr)
    return original
