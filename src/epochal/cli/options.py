"""The flags that several commands share, and the file that they can be read from."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, validators

from epochal.errors import PlanError

Recipe = Annotated[Path, Parameter(help="A Python file with plan(...) -> epochal.Plan.")]
Seconds = Annotated[float, Parameter(help="Of training for each measurement.", validator=validators.Number(gt=0))]
Run = Annotated[Path | None, Parameter(help="The run folder, new or empty; by default the next free one in runs/.")]
Device = Annotated[str, Parameter(help="auto takes the accelerator, if there is one; or cpu, cuda, cuda:1, mps.")]
Seed = Annotated[
    int,
    Parameter(
        help="For the weights at the start, the order of the data and their division.",
        validator=validators.Number(gte=0, lt=2**63),
    ),
]
Epochs = Annotated[int, Parameter(help="How many times the data are gone through, at most.")]
Precision = Annotated[Literal["fp32", "bf16", "fp16"], Parameter(help="What the model computes in.")]
Strategy = Annotated[
    Literal["auto", "ddp", "fsdp"],
    Parameter(
        help="How several processes train: ddp (each has the whole model; auto is that), or fsdp (each has a part)."
    ),
]
Config = Annotated[Path | None, Parameter(help="A TOML file of these flags.")]
Resume = Annotated[bool, Parameter(help="Go on with the run in the folder, if there is one.")]
Processes = Annotated[
    int | None,
    Parameter(help="How many train together on this machine; by default one.", validator=validators.Number(gte=1)),
]
Again = Annotated[
    int | None,
    Parameter(
        help="How many train together; by default as many as it was begun with.", validator=validators.Number(gte=1)
    ),
]
Restarts = Annotated[
    int | None,
    Parameter(help="How often all go on when one fails; by default never.", validator=validators.Number(gte=0)),
]
Threads = Annotated[
    int | None,
    Parameter(help="Of the host, for each process; by default what torch takes.", validator=validators.Number(gte=1)),
]
ChannelsLast = Annotated[
    bool | None, Parameter(help="Lay images out with their channels last, which convolutions may like.")
]
Json = Annotated[bool, Parameter(help="Print JSON.")]


def read_file(app: Any, commands: tuple[str, ...], arguments: Any) -> None:
    """A source of arguments for cyclopts: the file that ``--config`` names."""
    from cyclopts import Token
    from cyclopts.config import Dict

    named = arguments.get("--config", None)
    if named is None or not named.tokens:
        return
    path = Path(named.tokens[0].value)
    flags = read_flags(path)
    if sections := [name for name, value in flags.items() if isinstance(value, dict)]:
        what = f"the configuration has a section [{sections[0]}], but holds the flags of one command."
        raise PlanError(what, where=str(path), fix="write the flags at the top, without a section: epochs = 20")
    changes = arguments.get("--set", None)
    if changes is not None and changes.tokens and isinstance(flags.get("set"), list):  # those given later count
        every = [*map(str, flags.pop("set")), *(token.value for token in changes.tokens)]
        changes.tokens[:] = [Token(keyword="--set", value=change, index=at) for at, change in enumerate(every)]
    Dict(flags, source=str(path), use_commands_as_keys=False)(app, commands, arguments)


def read_flags(path: Path) -> dict[str, Any]:
    """What a TOML file of flags holds. Raises PlanError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        fix = "name a TOML file with lines like: epochs = 20"
        raise PlanError(f"the configuration cannot be read: {reason}.", where=str(path), fix=fix) from error
