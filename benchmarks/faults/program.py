"""What a program of the benchmark is, and which half of them may be looked at while rules are written."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DRAWN_BY = 20261130  # the seed that draws the half which is tuned on; it was drawn before any rule was written

Make = Callable[[], dict[str, Any]]  # the options of epochal.Plan, all of them made anew; what it draws it seeds itself


@dataclass(frozen=True)
class Program:
    """make: see Make; its docstring says in a sentence what is wrong, or what looks wrong and is not.

    cause: the code of the mistake, None for a healthy program. also: codes that name the same mistake as well.
    """

    make: Make
    cause: str | None = None
    also: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.make.__name__


PROGRAMS: dict[str, Program] = {}


def _keep(program: Program) -> None:
    if program.name in PROGRAMS:
        raise ValueError(f"two programs are called {program.name}")
    PROGRAMS[program.name] = program


def faulty(cause: str, *also: str) -> Callable[[Make], Make]:
    """Marks a function as a faulty program of this cause."""

    def decorate(make: Make) -> Make:
        _keep(Program(make, cause, also))
        return make

    return decorate


def healthy(make: Make) -> Make:
    """Marks a function as a healthy program, in which nothing may be found."""
    _keep(Program(make))
    return make


def halves(programs: dict[str, Program]) -> tuple[list[Program], list[Program]]:
    """The half to tune on and the half that is only scored, drawn among the faulty and among the healthy ones."""
    tuned: list[Program] = []
    scored: list[Program] = []
    for is_faulty in (True, False):
        names = sorted(name for name, program in programs.items() if (program.cause is not None) is is_faulty)
        drawn = set(random.Random(DRAWN_BY).sample(names, len(names) // 2))
        tuned += [programs[name] for name in names if name in drawn]
        scored += [programs[name] for name in names if name not in drawn]
    return tuned, scored
