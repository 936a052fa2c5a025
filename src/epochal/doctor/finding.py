"""What is found, and the rules that find it: a rule is a function with a page, its docstring."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, NamedTuple

from epochal.errors import UnknownNameError

LEVELS = ("error", "warning", "info")
# When a rule looks, from causes to symptoms; of one level, what is found earlier in this order is told first.
STAGES = (
    "static",
    "settings",
    "dependence",
    "wiring",
    "batch",
    "graph",
    "step",
    "data",
    "probe",
    "trial",
    "capacity",
    "symptom",
    "rows",
    "other",
)


@dataclass(frozen=True)
class Finding:
    """A mistake, or what looks like one.

    code: its stable name, for ``ignore=`` and ``epochal explain``. level: ``error`` (a provable contradiction),
    ``warning`` (statistical, and seen several times) or ``info``. what: the finding itself. measured: against which
    threshold. where: layer, parameter, column, or file and line. why: it matters. fix: one concrete change. step: the
    updates that were done before it was seen, None where none was needed. stage: what showed it, of STAGES.
    """

    code: str
    level: str
    what: str
    measured: str
    where: str
    why: str
    fix: str
    step: int | None = None
    stage: str = "other"

    def __str__(self) -> str:
        lines = [f"{self.level} {self.code}: {self.what}"]
        named = ("measured", "where", "why", "fix")
        return "\n".join(
            [*lines, *(f"  {name + ':':<9} {getattr(self, name)}" for name in named if getattr(self, name))]
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Seen(NamedTuple):
    """What a rule yields: a finding without what is the same for all of its rule. level: where it is not the rule's."""

    what: str
    measured: str
    where: str
    fix: str
    level: str | None = None


@dataclass(frozen=True)
class Rule:
    """A code, when and how surely it is looked for, and the function that does."""

    code: str
    level: str
    stage: str
    look: Callable[[Any], Iterator[Seen]]
    told: str  # the stage in whose place it is told, where that is another one

    @cached_property
    def page(self) -> str:
        return inspect.getdoc(self.look) or ""

    @property
    def why(self) -> str:
        """The first paragraph of the page."""
        return " ".join(self.page.partition("\n\n")[0].split())

    def findings(self, case: Any, step: int | None = None) -> Iterator[Finding]:
        for seen in self.look(case):
            level = seen.level or self.level
            yield Finding(self.code, level, seen.what, seen.measured, seen.where, self.why, seen.fix, step, self.told)


RULES: list[Rule] = []  # a code may be found in several ways
BY_STAGE: dict[str, list[Rule]] = {stage: [] for stage in STAGES}


def rule(code: str, level: str, stage: str, *, told: str | None = None) -> Callable[[Callable], Callable]:
    """Makes a function the rule of a code. It takes what its stage knows, and yields what it has :class:`Seen`."""

    def decorate(look: Callable) -> Callable:
        RULES.append(one := Rule(code, level, stage, look, told or stage))
        BY_STAGE[stage].append(one)
        return look

    return decorate


def is_ignored(code: str, ignore: Iterable[str]) -> bool:
    """Whether one of the codes or patterns (``lr-*``, ``*``) names it."""
    return any(fnmatchcase(code, pattern) for pattern in ignore)


def refuse_unknown(ignore: Iterable[str]) -> None:
    """Raises UnknownNameError for what names no code."""
    for pattern in ignore:
        if not any(fnmatchcase(code, pattern) for code in known()):
            error = UnknownNameError.of_name("finding", pattern, known(), where=f"ignore={pattern!r}")
            error.fix = f"{error.fix}: epochal explain lists them"
            raise error


def every() -> list[Rule]:
    """All rules, in the order in which they are told."""
    from epochal.doctor import rules  # noqa: F401  (it fills RULES)

    return RULES


def known() -> dict[str, Rule]:
    """Of each code the rule that tells most: the first of those with the highest level."""
    found: dict[str, Rule] = {}
    for one in sorted(every(), key=lambda one: LEVELS.index(one.level)):
        found.setdefault(one.code, one)
    return found


def look(
    stage: str, case: Any, *, ignore: Sequence[str] = (), step: int | None = None, only_errors: bool = False,
    until: float = math.inf, left_out: list[str] | None = None,
) -> list[Finding]:  # fmt: skip
    """What the rules of a stage find. A rule that fails finds nothing: it must not end a training that would go well.

    until: a time, by perf_counter(), after which no rule begins; its code is put into ``left_out``.
    """
    found: list[Finding] = []
    rules = every() and BY_STAGE[stage]
    for one in rules if left_out is None else sorted(rules, key=lambda one: one.level != "error"):
        if not is_ignored(one.code, ignore) and (one.level == "error" or not only_errors):
            if left_out is not None and time.perf_counter() > until:
                left_out.append(one.code)
                continue
            try:
                found += [told for told in one.findings(case, step) if told.level == "error" or not only_errors]
            except Exception:
                if RAISES:
                    raise
    return found


RAISES = False  # set in tests and benchmarks, where a rule that fails is a bug to be seen


def ordered(findings: Sequence[Finding]) -> list[Finding]:
    """The most certain first, each code once; symptoms are no more than info where something is found that may be their
    cause."""
    places = {id(one): number for number, one in enumerate(every())}
    codes: dict[tuple[str, str], int] = {}
    for one in every():
        codes.setdefault((one.code, one.told), places[id(one)])

    def place(one: Finding) -> tuple[int, int, int]:
        return LEVELS.index(one.level), STAGES.index(one.stage), codes.get((one.code, one.stage), 0)

    is_explained = any(one.level != "info" and STAGES.index(one.stage) < STAGES.index("symptom") for one in findings)
    told = [
        replace(one, level="info") if is_explained and one.stage == "symptom" and one.level != "info" else one
        for one in findings
    ]
    first: dict[str, Finding] = {}
    for one in sorted(told, key=place):
        first.setdefault(one.code, one)
    if any(one.level == "error" and one.code != "raises" for one in first.values()):
        first.pop("raises", None)
    return list(first.values())
