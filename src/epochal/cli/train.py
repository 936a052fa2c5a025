"""``epochal train RECIPE.py``: what the plan(...) of a Python file plans; its parameters become flags."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from epochal.cli import options
from epochal.cli.options import Precision, Processes, Restarts, read_flags
from epochal.errors import EpochalError, PlanError, RecipeError
from epochal.runtime.launched import decided, is_restarted, launches, together

if TYPE_CHECKING:
    from epochal.plan import Plan

PLANNED = ("device", "seed", "epochs", "precision", "strategy")  # flags that change the plan
STARTED = ("processes", "restarts", "threads", "channels_last")  # those that change how it is begun
Set = Annotated[list[str], Parameter(name="--set", show_default=False, help="option=value of the plan; several times.")]


def train(
    recipe: Annotated[Path, Parameter(help="A Python file with plan(...) -> epochal.Plan.")],
    /,
    *,
    run: options.Run = None,
    device: options.Device | None = None,
    seed: options.Seed | None = None,
    epochs: options.Epochs | None = None,
    precision: Precision | None = None,
    strategy: options.Strategy | None = None,
    changes: Set = [],  # noqa: B006  (it is only read)
    processes: Processes = None,
    restarts: Restarts = None,
    threads: options.Threads = None,
    channels_last: options.ChannelsLast = None,
    config: options.Config = None,
    resume: options.Resume = False,
    drawn: Annotated[int | None, Parameter(show=False)] = None,  # the seed of a run that was given none, to resume it
) -> None:
    """Train what a recipe plans: plan(...) in a Python file.

    The parameters of plan() are flags too: epochal train RECIPE.py --help shows them. Where one has the name of a
    flag of epochal, it is the recipe's, and --set still changes the plan. What is not given stays as planned.
    """
    given = {name: value for name, value in locals().items() if name != "recipe"}
    carry_out(recipe, load(recipe), {}, given)


def command(
    recipe: Path, face: Callable[..., None], carry_out: Callable[..., None], load: Callable[[Path], Callable[..., Any]]
) -> Callable[..., None]:
    """A command that takes a recipe, with the flags of this one.

    face: the command without them. carry_out: what it does, with the path, the function plan(), its arguments and
    those of ``face``. load: gives that function.
    """
    plan = load(recipe)
    try:
        theirs = inspect.signature(plan, eval_str=True).parameters
    except Exception as error:
        fix = "give them types that exist: int, float, str, bool, Literal, ..."
        raise RecipeError(f"the parameters of plan() cannot be read: {error}.", where=str(recipe), fix=fix) from error
    own = inspect.signature(face, eval_str=True).parameters
    if taken := sorted({"recipe", "changes", "set", "config"} & set(theirs)):
        what = f"the parameter {taken[0]!r} of plan() has a name that epochal needs."
        raise RecipeError(what, where=str(recipe), fix="give it another name")

    def run(recipe: Path, **given: Any) -> None:
        chosen = {name: given.pop(name) for name in theirs if name in given}
        defaults = {name: one.default for name, one in own.items() if name not in {"recipe", *theirs}}
        carry_out(recipe, plan, chosen, {**defaults, **given})

    group = Group(f"Parameters of {recipe.name}", sort_key=-1)
    flags = [_flag(one, group) for one in theirs.values() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    parameters = [own["recipe"], *flags, *(one for name, one in own.items() if name not in {"recipe", *theirs})]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__doc__ = inspect.getdoc(plan if face is train else face) or f"Train what {recipe.name} plans."
    return run


def _flag(parameter: inspect.Parameter, group: Group) -> inspect.Parameter:
    hint = parameter.annotation
    if hint is parameter.empty:
        hint = str if parameter.default in (parameter.empty, None) else type(parameter.default)
    settings = Parameter(group=group, negative_bool="no-")
    return parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=Annotated[hint, settings])


def load(path: Path) -> Callable[..., Any]:
    """The function ``plan`` of a file, which is run as a module of its name, with its folder in sys.path."""
    if path.suffix != ".py" or not path.is_file():
        what = "there is no such recipe." if path.suffix == ".py" else "a recipe is a Python file, and ends in .py."
        raise RecipeError(what, where=str(path), fix="give a file with a function plan(...) -> epochal.Plan")
    if (folder := str(path.parent.absolute())) not in sys.path:
        sys.path.insert(0, folder)  # as Python does for a script; it stays, for worker processes need it too
    spec = importlib.util.spec_from_file_location(path.stem, path.absolute())
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    with blaming(path):
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    if not callable(getattr(module, "plan", None)):
        fix = "define plan(...) -> epochal.Plan in it; a script that calls fit is started with python, or by torchrun"
        raise RecipeError("the recipe has no function plan.", where=str(path), fix=fix)
    return module.plan


def carry_out(path: Path, make: Callable[..., Any], chosen: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    if launches(given.get("processes"), given.get("restarts")):
        return
    from epochal.cli import training

    if given.get("drawn") is None and given.get("seed") is None and "seed" not in chosen:
        before = decided("seed", lambda: _seed_before(given) or {"drawn": int.from_bytes(os.urandom(4))})
        if isinstance(before.get("seed"), int) and "seed" in inspect.signature(make).parameters:  # the recipe's own
            chosen = {**chosen, "seed": before.pop("seed")}
        given = {**given, **before}
    plan = together(lambda: planned(path, make, chosen, given))
    files = {"recipe.py": path.read_bytes()}
    with blaming(path):
        words = ["train", str(path.absolute())]
        training.train(plan, words, flags(chosen, given), files, "epochal runs show {run}")


def _seed_before(given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that chose the seed of a run that is resumed: with another one, its data would be divided anew."""
    path = Path(given["run"] or "", "recipe.toml")
    if not ((given["resume"] or is_restarted()) and given["run"] and path.is_file()):
        return {}
    known = read_flags(path)
    if changes := [change for change in known.get("set", []) if re.match(r"\s*seed\s*=", change)]:
        return {"changes": [*changes, *given["changes"]]}
    return {name: known[name] for name in ("seed", "drawn") if name in known}


def flags(chosen: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags with which the same is asked of the recipe again; the run folder is not part of it."""
    changes = [change for change in given["changes"] if not re.match(r"\s*(run|resume)\s*=", change)]
    return {**{name: given.get(name) for name in (*PLANNED, *STARTED, "drawn")}, **chosen, "set": changes}


def planned(path: Path, make: Callable[..., Any], chosen: Mapping[str, Any], given: Mapping[str, Any]) -> Plan:
    """What the recipe plans, with what is chosen; what is given on top changes the plan."""
    import epochal
    from epochal.runtime.device import set_threads, to_channels_last
    from epochal.runtime.seeding import seed_everything

    changed = {name: given[name] for name in ("run", *PLANNED) if given.get(name) is not None}
    changed |= {"resume": True} if given.get("resume") else {}
    changed |= dict(_change(change) for change in given["changes"])
    drawn = given.get("drawn")
    seed = changed.get("seed", chosen.get("seed", drawn))
    threads = given.get("threads")
    if threads is not None:
        set_threads(threads)
    with blaming(path):
        if isinstance(seed, int):
            seed_everything(seed)  # before plan() makes the weights
        plan = make(**chosen)
    if threads is not None:
        set_threads(threads)  # what is given counts, and not what the recipe has set
    if not isinstance(plan, epochal.Plan):
        what = f"plan() gave a {type(plan).__name__}, not an epochal.Plan."
        raise RecipeError(what, where=str(path), fix="end it with: return epochal.Plan(...)")
    if plan.seed is None and "seed" not in changed and drawn is not None:
        changed["seed"] = drawn
    if given.get("channels_last"):
        to_channels_last(plan.model)
    return plan.replace(**changed)


def _change(text: str) -> tuple[str, Any]:
    """The option and the value of ``option=value``: a TOML value, ``none``, or else the text itself."""
    option, equals, value = text.partition("=")
    if not equals:
        raise PlanError("--set takes option=value.", where=f"--set {text}", fix="try --set batch_size=64")
    try:
        return option.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return option.strip(), None if value.strip().lower() == "none" else value.strip()


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Makes an error out of a recipe, or a file beside it, a RecipeError that names the line."""
    try:
        yield
    except EpochalError:
        raise
    except Exception as error:
        places = [
            f"{os.path.relpath(frame.filename)}:{frame.lineno}, in {frame.name}"
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).parent == path.parent.absolute()
        ]
        if isinstance(error, SyntaxError) and error.filename:
            places = [f"{os.path.relpath(error.filename)}:{error.lineno}"]
        places = places[-1:] + [note.removeprefix("epochal: ") for note in getattr(error, "__notes__", ())]
        if not places:
            raise
        what = next(iter(str(error).splitlines()), "no message").rstrip(".")
        fix = "mend the recipe; --traceback shows the whole way there"
        where = "; ".join(places)
        raise RecipeError(f"the recipe raised {type(error).__name__}: {what}.", where=where, fix=fix) from error
