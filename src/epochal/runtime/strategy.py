"""How several processes train one model, as a value; what carries it out is loaded only where there are several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from torch import nn

from epochal.cadence import Every
from epochal.errors import PlanError, UnknownNameError

KINDS = ("auto", "ddp", "fsdp")


@dataclass(frozen=True)
class Strategy:
    """How several processes train one model; in a world of one it says nothing.

    kind: ``"ddp"`` (each has the whole model), ``"fsdp"`` (each has a part of every weight, its gradient and what the
    optimizer keeps for it), or ``"auto"``, which is ``"ddp"``. wrap: for fsdp, the classes of the modules that are put
    together one at a time; by default the repeated blocks of the model. activation_checkpointing: for fsdp, compute
    the insides of these blocks again in the backward pass instead of keeping them. timeout: how long a process is
    waited for.

    >>> Strategy("fsdp", wrap=[nn.TransformerEncoderLayer], timeout="2 min").patience.seconds
    120
    """

    kind: str = "auto"
    wrap: Sequence[type[nn.Module]] | None = None
    activation_checkpointing: bool = False
    timeout: str = "5 min"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownNameError.of_name("strategy", self.kind, KINDS, where=f"strategy={self.kind!r}")
        if Every.parse(self.timeout, where="timeout").unit != "second":
            raise PlanError("timeout is a time.", where=f"timeout={self.timeout!r}", fix='give for example "5 min"')
        if self.kind != "fsdp" and (self.wrap or self.activation_checkpointing):
            fix = 'give Strategy("fsdp", ...), or leave them out'
            raise PlanError("wrap and activation_checkpointing belong to fsdp.", where=f"{self}", fix=fix)

    @classmethod
    def of(cls, given: Strategy | str) -> Strategy:
        return given if isinstance(given, Strategy) else cls(given)

    def __str__(self) -> str:
        named = ", ".join(one.__name__ for one in self.wrap or ())
        options = [f"wrap {named}"] if named else []
        options += ["activation checkpointing"] if self.activation_checkpointing else []
        return f"{self.kind} ({', '.join(options)})" if options else self.kind

    @property
    def patience(self) -> timedelta:
        return timedelta(seconds=Every.parse(self.timeout).count)
