"""``epochal verify-resume RECIPE.py``: the same run straight, and killed and resumed, compared to the bit."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from cyclopts import Parameter, validators

from epochal.cli.folders import print_facts
from epochal.cli.options import Config, Device, Epochs, Precision, Seed
from epochal.cli.train import Set, blaming, flags, load, planned
from epochal.cli.training import written
from epochal.errors import CheckpointError, Interrupted, RecipeError

TASK = "EPOCHAL_VERIFY"  # in the environment of a child: what it is to do, as JSON
ASKED = "flags.toml"
MOST = 200  # steps, unless more are asked for
# Imports what is slow once, and then runs each task in a fork of its own. The recipe is loaded in the fork.
SERVER = f"""
import os, signal, sys, epochal.plan
from epochal.__main__ import main
signal.signal(signal.SIGINT, signal.SIG_DFL)
for task in sys.stdin:
    if (child := os.fork()) == 0:
        os.dup2(2, 1)
        os.environ["{TASK}"] = task
        sys.exit(main(sys.argv[1:]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
AT_LEAST_1 = validators.Number(gte=1)
PARTS = {  # compared before every update, in the order in which one leads to the other -> what it is called
    "batch": "the batch", "python": "python's generator", "numpy": "numpy's generator", "torch": "torch's generator",
    "parameters": "the weights", "optimizer": "the state of the optimizer",
}  # fmt: skip
SECTIONS = {"model": "weights", "optimizer": "optimizer", "generators": "generators", "rows": "history"}
SEEDED = "seed every generator that the recipe makes, or draw from the global ones"
DRAWN = "draw from the global generators, or keep the generator as an attribute of the data set or its transform"
KEPT = "keep what changes an update in a state_dict: a buffer, get_extra_state, or the state_dict of a step"


def verify_resume(
    recipe: Annotated[Path, Parameter(help="A Python file with plan(...) -> epochal.Plan.")],
    /,
    *,
    kills: Annotated[int, Parameter(help="How often the second run is killed.", validator=AT_LEAST_1)] = 2,
    steps: Annotated[
        int | None, Parameter(help=f"The length in steps; by default the recipe's, or {MOST}.", validator=AT_LEAST_1)
    ] = None,
    device: Device | None = None,
    seed: Seed | None = None,
    epochs: Epochs | None = None,
    precision: Precision | None = None,
    changes: Set = [],  # noqa: B006  (it is only read)
    config: Config = None,
) -> None:
    """Prove that a recipe can be killed and resumed to the bit.

    It is run twice in temporary folders: straight, and again while it is killed by SIGKILL and resumed. Every batch and
    generator, the weights, the state of the optimizer and the history have to be equal. If they are not, the first
    difference is named, and the exit code is 1. The parameters of plan() are flags too.
    """
    given = {name: value for name, value in locals().items() if name != "recipe"}
    carry_out(recipe, load(recipe), {}, given)


def carry_out(path: Path, make: Callable[..., Any], chosen: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    if task := os.environ.get(TASK):
        _run(path, make, chosen, given, **json.loads(task))
        return
    kills, most = given.get("kills", 2), given.get("steps") or MOST
    scratch = tempfile.TemporaryDirectory(prefix="epochal-verify-")
    with _ended_by_signals(), scratch as folder, _server(path, Path(folder)) as server:
        Path(folder, ASKED).write_text(written(flags(chosen, given)))
        straight, killed = Path(folder, "straight"), Path(folder, "killed")
        print("running straight", file=sys.stderr)
        _in_a_child(server, {"run": str(straight), "steps": most, "every": most})
        length = _state(straight)["progress"]["step"]
        every = max(2, length // (2 * kills + 2))
        at = sorted({max(1, length * (i + 1) // (kills + 1)) for i in range(kills)})
        at = [step + (step % every == 0 and step < length) for step in at]  # between two savings
        for step in at:
            print(f"running until it is killed after step {step}", file=sys.stderr)
            _in_a_child(server, {"run": str(killed), "steps": most, "every": every, "kill_at": step})
        print("running to its end", file=sys.stderr)
        _in_a_child(server, {"run": str(killed), "steps": most, "every": every})
        _compare(path, straight, killed, at)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Inside, SIGTERM or a terminal that is closed leaves nothing behind, as Ctrl-C does."""
    from epochal.runtime.signals import TERMINATE

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # nothing shall disturb the tidying
        error = Interrupted(f"ended by {signal.Signals(number).name}.", fix="run it again; nothing was left behind")
        error.exit_code = 128 + number
        raise error

    usual = {number for number in TERMINATE if signal.getsignal(number) == signal.SIG_DFL}
    before = {number: signal.signal(number, end) for number in usual}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _server(path: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    given = {name: value for name, value in os.environ.items() if not name.startswith("EPOCHAL_")}
    command = [sys.executable, "-c", SERVER, "verify-resume", str(path), "--config", str(folder / ASKED)]
    pipe: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=given, start_new_session=True, **pipe) as server:
        try:
            yield server
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # the run in hand, too, if this ends before it


def _in_a_child(server: subprocess.Popen[str], task: dict[str, Any]) -> None:
    """Runs the recipe in a process of its own, in the folder ``run``; a trace of the steps stands beside it."""
    assert server.stdin is not None and server.stdout is not None
    run = Path(task["run"])
    trace = run.with_name(f"{run.name}-{len(_traces(run))}.jsonl")
    print(json.dumps({**task, "trace": str(trace)}), file=server.stdin, flush=True)
    code = int(server.stdout.readline() or 1)
    if code not in (0, -signal.SIGKILL if "kill_at" in task else 0):
        fix = "mend what stands above; epochal train runs the recipe alone"
        raise RecipeError(f"a run of the recipe ended with exit code {code}.", fix=fix)


def _run(
    path: Path, make: Callable[..., Any], chosen: Mapping[str, Any], given: Mapping[str, Any],
    *, run: str, steps: int, every: int, trace: str, kill_at: int | None = None,
) -> None:  # fmt: skip
    """In the child: one run, or what is left of it, until it ends or is killed."""
    from epochal.checkpoint.store import Saving
    from epochal.events import StepDone

    seed = {} if "seed" in chosen or given.get("seed") is not None else {"seed": 0}  # else no two runs are the same
    plan = planned(path, make, chosen, {**given, **seed})
    plan = plan.replace(
        run=run, resume=True, save=Saving(f"{every} steps", share=None), observers=plan.observers or (),
        max_steps=min(steps, plan.max_steps or steps), max_time=None,
    )  # fmt: skip
    with blaming(path), plan.prepare() as prepared, open(trace, "w") as log:
        names = {id(p): name for module in prepared.state.modules for name, p in module.named_parameters()}
        groups = prepared.state.optimizer.param_groups if prepared.state.optimizer is not None else []
        parameters = [names.get(id(p), "?") for group in groups for p in group["params"]]
        print(json.dumps({"parameters": parameters, "exactness": prepared.train.exactness}), file=log, flush=True)
        prepared.step = _traced(prepared.step, log)
        for event in prepared:
            if isinstance(event, StepDone) and event.step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


def _traced(step: Callable, log: Any) -> Callable:
    """The step, and before each update a line with digests of all that it depends on."""
    from epochal.runtime.seeding import generator_states

    def traced(state: Any, window: Any) -> Any:
        generators = generator_states()
        parts = {
            "batch": window.batches, **{kind: generators[kind] for kind in ("python", "numpy", "torch")},
            "optimizer": state.optimizer and state.optimizer.state_dict(), "parameters": state.model.state_dict(),
        }  # fmt: skip
        digests = {name: _digest(part) for name, part in parts.items()}
        print(json.dumps({"step": state.progress.step + 1, **digests}), file=log, flush=True)
        return step(state, window)

    if hasattr(step, "settle"):
        traced.settle = step.settle  # type: ignore[attr-defined]
    return traced


def _digest(value: Any) -> str:
    """Of a value, to the bit; what cannot be saved is not compared."""
    from epochal.checkpoint import codec, tensors

    try:
        tree, named = codec.encode(value)
    except CheckpointError:
        return type(value).__name__
    digest = hashlib.sha256(codec.dumps(tree))
    for chunk in tensors.chunks({name: tensor.cpu() for name, tensor in named.items()}):
        digest.update(chunk)
    return digest.hexdigest()


def _traces(run: Path) -> list[Path]:
    """One for each time that the run was begun or resumed."""
    return sorted(run.parent.glob(f"{run.name}-*.jsonl"), key=lambda path: int(path.stem.rpartition("-")[2]))


def _state(run: Path) -> dict[str, Any]:
    """What a run ended with, without what tells the time."""
    from epochal.checkpoint.store import Checkpoints
    from epochal.state import unpacked

    found = Checkpoints(run / "checkpoints").newest_whole()
    assert found is not None, "a run saves its end"
    state = {name: part for name, part in found.state.items() if name != "about"}
    state["progress"] = {name: value for name, value in state["progress"].items() if name != "seconds"}
    state["rows"] = [{name: value for name, value in row.items() if name != "time"} for row in unpacked(state["rows"])]
    return state


def _compare(path: Path, straight: Path, killed: Path, at: Sequence[int]) -> None:
    """Prints what is equal and what is not. Raises RecipeError if anything is not."""
    known, *lines = (json.loads(line) for line in _traces(straight)[0].read_text().splitlines())
    expected = {line["step"]: line for line in lines}
    first = next(_deviations(expected, _traces(killed)), None)
    one, other = _state(straight), _state(killed)
    parts = (*SECTIONS, *sorted(one.keys() | other.keys()))
    places = {part: _difference(one.get(part), other.get(part)) for part in parts}
    told = {name: _named(name, place, known["parameters"]) for name, place in places.items() if place is not None}
    if not told and (straight / "model.safetensors").read_bytes() != (killed / "model.safetensors").read_bytes():
        told["weights"] = "model.safetensors"
    rest = [line for name, line in told.items() if name not in SECTIONS]
    print_facts(
        {
            "recipe": str(path),
            "run": f"{one['progress']['step']} steps; killed after step {' and '.join(map(str, at))}, and resumed",
            "batches": f"differ from step {first.step} on" if first and first.part == "batch" else "equal",
            **{label: f"differ: {told[name]}" if name in told else "equal" for name, label in SECTIONS.items()},
            "the rest": f"differs: {', '.join(rest)}" if rest else "equal",
        }
    )
    if first is not None or told:
        raise _failure(first, next(iter(told.values()), None), known["exactness"])


class Deviation(NamedTuple):
    """Where the second run leaves the first: after which kill, resumed from which step, before which step, in what."""

    kills: int
    resumed: int
    step: int
    part: str


def _deviations(expected: Mapping[int, Any], traces: Sequence[Path]) -> Iterator[Deviation]:
    for kills, trace in enumerate(traces):
        lines = list(map(json.loads, trace.read_text().splitlines()[1:]))
        for line in lines:
            for part in PARTS:
                if line["step"] in expected and line[part] != expected[line["step"]][part]:
                    yield Deviation(kills, lines[0]["step"] - 1, line["step"], part)


def _failure(first: Deviation | None, entry: str | None, exactness: str | None) -> RecipeError:
    """exactness: what is known of the loader that cannot be repeated."""
    what, at_the_end = "the resumed run differs", f"at the end, {entry}" if entry else "in the end it is the same again"
    if first is None:  # after the last update, or in what no update depends on
        return RecipeError(f"{what} in its end alone.", where=at_the_end, fix=KEPT)
    fix = exactness or DRAWN
    if first.part in ("parameters", "optimizer"):
        fix = KEPT
        if first.step > first.resumed + 1:  # it was on its way again
            same = "the same batch, weights, optimizer and generators"
            what += f": from {same}, step {first.step - 1} made something else"
    when = f"after kill {first.kills}, resumed from step {first.resumed}"
    if first.kills == 0:
        what, when, fix = "a second run differs even without a kill", "with the same seed", SEEDED
    where = f"{when}, before step {first.step}, first in {PARTS[first.part]}; {at_the_end}"
    return RecipeError(f"{what}.", where=where, fix=fix)


def _difference(one: Any, other: Any, path: tuple = ()) -> tuple | None:
    """The way to the first entry that differs, None if there is none."""
    if _digest(one) == _digest(other):
        return None
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs: Any = [(key, one[key], other[key]) for key in one]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = list(zip(range(len(one)), one, other))
    else:
        return path
    return next((found for key, a, b in pairs if (found := _difference(a, b, (*path, key))) is not None), path)


def _named(part: str, place: tuple, names: Sequence[str]) -> str:
    """An entry of the state in words."""
    match part, place:
        case "model", (name, *_):
            return f"parameter {name}"
        case "optimizer", ("state", int(number), key, *_) if number < len(names):
            return f"{key} of {names[number]}"
        case "rows", (int(number), column, *_):
            return f"row {number + 1}, {column}"
    return ".".join(map(str, (part, *place)))
