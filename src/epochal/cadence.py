"""How often something happens, or how long something lasts, as a value: "1 epoch", "500 steps", "10 min"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from epochal.errors import PlanError

_UNITS = {
    "epoch": ("epoch", "epochs", "ep"),
    "step": ("step", "steps"),
    "second": ("s", "sec", "secs", "second", "seconds"),
    "minute": ("m", "min", "mins", "minute", "minutes"),
    "hour": ("h", "hour", "hours"),
}
_SECONDS = {"second": 1, "minute": 60, "hour": 3600}


@dataclass(frozen=True)
class Every:
    """unit: ``"epoch"``, ``"step"`` or ``"second"``; count: how many of them, above 0.

    >>> Every.parse("500 steps"), Every.parse("2 min").count
    (Every(count=500, unit='step'), 120.0)
    """

    count: float
    unit: str

    @classmethod
    def parse(cls, text: str | Every, *, where: str = "every") -> Every:
        """Reads ``"1 epoch"``, ``"500 steps"``, ``"10 min"``; raises PlanError for anything else."""
        if isinstance(text, Every):
            return text
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]+)\s*", str(text).lower())
        unit = next((unit for unit, words in _UNITS.items() if match and match[2] in words), None)
        count = float(match[1]) if match else 0
        if unit is None or count <= 0 or (unit in ("epoch", "step") and count != int(count)):
            what = f"{text!r} is not a number of epochs, steps or minutes."
            raise PlanError(what, where=f"{where}={text!r}", fix='give for example "1 epoch", "500 steps" or "10 min"')
        return cls(count * _SECONDS[unit], "second") if unit in _SECONDS else cls(int(count), unit)

    def __str__(self) -> str:
        return f"{self.count:g} {self.unit}{'s' if self.count != 1 else ''}"

    def due(self, *, step: int, epoch: int, at_epoch_end: bool, seconds: float) -> bool:
        """Whether it is time: ``epoch`` epochs are done, ``seconds`` have gone by since the last time."""
        if self.unit == "epoch":
            return at_epoch_end and epoch % self.count == 0
        if self.unit == "step":
            return not at_epoch_end and step % self.count == 0
        return not at_epoch_end and seconds >= self.count


def amount(limit: float | str | None) -> float | None:
    """A limit as a number: of a text its count, in seconds where it is a time."""
    return Every.parse(limit).count if isinstance(limit, str) else limit
