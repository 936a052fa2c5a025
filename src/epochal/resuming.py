"""Continuing a run: what is put back, and what is told of all that has changed since."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from torch import nn

from epochal.cadence import amount
from epochal.checkpoint.store import Checkpoints, Found
from epochal.checkpoint.weights import IMPORTED, load_into, load_weights
from epochal.data.fingerprint import fingerprint
from epochal.data.loader import Loader
from epochal.describe import config
from epochal.errors import CheckpointError, RunFolderError
from epochal.events import StopReason
from epochal.observe.console import counted
from epochal.observe.early_stopping import EarlyStopping
from epochal.runtime import seeding
from epochal.runtime.environment import environment
from epochal.runtime.processes import Group, world

if TYPE_CHECKING:
    from epochal.plan import Plan
    from epochal.run import Run
    from epochal.state import TrainState

UNTOLD = {"run", "resume", "save"}  # options that say nothing of the training
LENGTHS = ("epochs", "max_steps", "max_time")
# What may change without a bit of an update changing.
HARMLESS = {*LENGTHS, "patience", "early_stopping", "epochal", "git_commit", "cores", "workers"}
INEXACT = "no longer exact, as these have changed"
KEPT = {"lr", "weight_decay", "seed"}  # as the settings of an optimizer, they are in the state


def about(plan: Plan, run: Run) -> dict[str, Any]:
    """What a run is compared with when it is resumed: its plan, its data, and what it ran on."""
    state, val = run.state, run.validation.loader
    is_named = plan.optimizer is None or isinstance(plan.optimizer, str)  # its settings stand in the plan
    size = world().size
    machine = {name: value for name, value in environment().items() if name != "memory_gib"}
    return {
        "plan": {name: value for name, value in config(plan).items() if name not in UNTOLD},
        "parts": {
            "optimizer": _kind(state.optimizer),
            "schedule": _kind(getattr(state.schedule, "scheduler", None)),
            "monitor": f"{run.best.monitor} ({run.best.mode})",
        },
        "settings": {
            "loss": _plain(vars(plan.loss)) if isinstance(plan.loss, nn.Module) else {},
            "early_stopping": _plain(vars(plan.early_stopping)) if plan.early_stopping else {},
            "optimizer": {} if is_named else _plain(getattr(state.optimizer, "defaults", {})),
        },
        "data": {"train": fingerprint(run.train)} | ({} if val is None else {"val": fingerprint(val)}),
        "environment": {
            **machine,
            "device": run.setting.device.type if size > 1 else str(run.setting.device),
            "processes": size,
        },
    }


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in settings.items() if isinstance(x, int | float | str) and not name.startswith("_")}


def _kind(part: Any) -> str:
    return "none" if part is None else type(part).__name__


def resume(run: Run, folder: Path, checkpoints: Checkpoints) -> Iterator[str]:
    """Puts back the newest checkpoint that is whole, and tells what there is to know of it.

    Raises CheckpointError if none is whole, or if it is another run's; nothing has been changed then.
    """
    found = _newest(checkpoints)
    if found is None:
        rows = folder / "results.csv"  # empty as long as there is none
        if (folder / "model.safetensors").exists() or (rows.exists() and rows.stat().st_size):
            what, fix = "the run has no checkpoint that could be resumed from.", "begin another one in a new folder"
            raise RunFolderError(what, where=f"{folder}: it holds results, which would be overwritten", fix=fix)
        if (weights := folder / IMPORTED).exists():
            load_into(run.state.model, load_weights(weights), str(weights))
            yield "begun with the weights that were imported."
        else:
            yield f"there is no checkpoint in {folder} yet: the run begins anew."
        return
    yield from (f"{Path(damaged.where or '').name} is left out: {damaged.what}" for damaged in found.damaged)
    recorded = defaultdict(dict, _told(found))
    _refuse_another_run(run.state, found, recorded["parts"], run.about["parts"])
    has_own = _own_part(run, found, checkpoints.group)
    _put_back(run.state, found)
    if not has_own:  # there were fewer, or more
        state = run.state
        seeding.diverge(checkpoints.group.rank, seeding.derive(state.seed, state.progress.step))
    run.keep_as_saved()
    yield f"resumed from {found.path.name}, after {counted(run.state.progress.step, 'step')}."
    changes = _changes(recorded, run.about)
    yield from (f"{meaning}: {', '.join(lines)}." for meaning, lines in sorted(changes.items()))
    if INEXACT in changes and isinstance(run.validation.loader, Loader):
        run.validation.loader.wide = None  # in larger batches other metrics, say, may be something else
    if "val" in run.about["plan"] and recorded["data"].get("val") != run.about["data"]["val"]:
        yield "rows of val may have been trained on: val is another part of train, unless only their values changed."
    if (schedule := run.state.schedule) is not None and schedule.length != (old := found.state["schedule"]["length"]):
        yield f"no longer exact: the schedule is stretched from {old} moves to {schedule.length}, and the rate follows."
    if run.state.stop is None:
        return
    stopping, is_longer = run.state.extras.get("early_stopping"), _is_longer(recorded["plan"], run.about["plan"])
    by_patience = run.state.stop.reason is StopReason.EARLY_STOPPING and _stopping(recorded) != _stopping(run.about)
    if not (is_longer or by_patience):
        yield "it had ended, and is not trained further: for that, raise epochs, max_steps, max_time or patience."
        return
    run.state.stop = None
    if isinstance(stopping, EarlyStopping):
        stopping.early_stop = False  # a new patience decides, over what has been counted
        if is_longer:
            stopping.begin_anew()
            yield "early stopping begins to count anew."


def _newest(checkpoints: Checkpoints) -> Found | None:
    """The newest checkpoint that is whole. Of several processes the first looks for it, and each reads it."""
    mine: list[Found | None] = [None]

    def look() -> tuple[Path, list[CheckpointError]] | None:
        mine[0] = found = checkpoints.newest_whole()
        return None if found is None else (found.path, found.damaged)

    group = checkpoints.group
    if (told := group.first(look)) is None:
        return None
    state = group.together(lambda: None if group.is_first else checkpoints.load(told[0]))
    if group.is_first:
        return mine[0]
    return Found(told[0], state, told[1])


def _own_part(run: Run, found: Found, group: Group) -> bool:
    """Of what several processes had of their own, puts this one's into the state; False if they were more, or fewer."""
    try:
        own = msgspec.convert(found.state.pop("processes", []), list[dict[str, Any]])
        if run.alike is not None:  # one process draws everything from what several draw alike
            seeding.try_generator_states(found.state["generators"])
            run.alike.states = found.state["generators"]
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise _misfit(found, "what it says of its processes cannot be read") from error
    if len(own) == group.size:
        found.state.update(own[group.rank])
    return len(own) == group.size or (group.size == 1 and not own)


def _told(found: Found) -> dict[str, dict[str, Any]]:
    try:
        return msgspec.convert(found.state.pop("about"), dict[str, dict[str, Any]])
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise _misfit(found, "what it says of its run cannot be read") from error


def _refuse_another_run(state: TrainState, found: Found, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """What cannot work: another kind of optimizer or schedule, or a part that the checkpoint knows nothing of."""
    if changed := [f"{name} {then.get(name)}, and now {now[name]}" for name in now if then.get(name) != now[name]]:
        raise _misfit(found, f"it was begun with {'; '.join(changed)}")
    if missing := [name for name in state.required if name not in found.state]:
        raise _misfit(found, f"its state holds no {', no '.join(missing)}")


def _put_back(state: TrainState, found: Found) -> None:
    try:
        state.load_state_dict(found.state)
    except CheckpointError as error:
        error.where = f"{found.path}; {error.where}"
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        told = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise _misfit(found, f"{type(error).__name__}: {told}") from error


def _misfit(found: Found, why: str) -> CheckpointError:
    fix = "resume with the model, the loss, the optimizer, the schedule and the metrics that the run was begun with"
    return CheckpointError("the checkpoint does not fit the plan.", where=f"{found.path}; {why}", fix=fix)


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]]:
    """A short list of what differs, by what it means."""
    changed = {
        name: f"{name} {_text(before.get(name))} {'instead of' if _stays(name) else '→'} {_text(after.get(name))}"
        for section in ("plan", "settings", "data", "environment")
        for before, after in [(_flat(then[section]), _flat(now[section]))]
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }
    told = defaultdict(list)
    for name, line in changed.items():
        told[_meaning(name)].append(line)
    return told


def _meaning(name: str) -> str:
    """What it means that an entry has changed."""
    if name.partition(" ")[0] in HARMLESS:
        return "changed since"
    return "the checkpoint's own goes on" if _stays(name) else INEXACT


def _stays(name: str) -> bool:
    return name in KEPT or name.startswith("optimizer ")


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in section.items():
        flat |= _flat(value, f"{prefix}{name} ") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _text(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:12]}…{text[-12:]}"


def _is_longer(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a limit was raised, or taken away."""
    limits = [(amount(then[name]), amount(now.get(name))) for name in LENGTHS if name in then]
    return any(limit is None or (before is not None and limit > before) for before, limit in limits)


def _stopping(recorded: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    return [recorded[section].get(name) for section in ("plan", "settings") for name in ("patience", "early_stopping")]
