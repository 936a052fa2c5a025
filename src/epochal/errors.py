"""Every error that epochal raises on purpose.

    EpochalError                 what happened, where, how to mend it
    ├── PlanError                an option of the plan cannot be right (several at once: ``.mistakes``)
    │   └── UnknownNameError     a name that is not among the known ones
    ├── DataError                the data are empty, ragged, of the wrong type, or cannot be read
    │   ├── TableError           a table or a column of it
    │   └── WorkerError          a process that loads data died or hangs
    ├── ModelError               the model and what it was given do not fit together
    ├── LossError                the loss cannot be computed, or is not a mean
    │   └── LossShapeError       outputs and targets of different shapes
    ├── FaultError               the doctor can prove a mistake; ``finding`` says it in parts
    ├── NonFiniteError           a NaN or an infinity reached the loss or the gradients
    ├── CheckpointError          a file of weights or a checkpoint cannot be read or written
    │   └── DiskFullError        there is no room for a checkpoint
    ├── FileError                a file cannot be written
    ├── RunFolderError           the run folder cannot be used
    ├── ProcessError             one of several processes died, hangs or went another way
    ├── RecipeError              a recipe raised, or does not define ``plan``
    ├── MissingPackageError      an optional package is needed and not installed
    └── Interrupted              a signal ended the run; it can be resumed

``exit_code`` is what the command line ends with.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

MANY = 40  # known names, of which not all are listed any more


class EpochalError(Exception):
    """An error in three parts: what is wrong, where, and how to mend it.

    >>> print(EpochalError("there are no samples.", where="train", fix="give at least one row"))
    there are no samples.
      where: train
      fix:   give at least one row
    """

    exit_code = 1
    is_shared = False  # whether every process of a group raises it, so that one can tell it for all
    rank: int | None = None  # of a shared one: the process it comes from, unless each of them met it

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, code: str | None = None):
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix
        self.code = code  # what `epochal explain` knows of it

    def __init_subclass__(cls) -> None:
        cls.__module__ = "epochal"  # what a traceback shows, and where users find the class

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def __reduce__(self):
        # Errors cross process borders (loader workers); keyword arguments would get lost.
        return _rebuild, (type(self), self.what, self.where, self.fix, self.code)

    def describe(self) -> str:
        """The error as the command line prints it, its class first."""
        return f"{f'rank {self.rank}: ' if self.rank is not None else ''}{type(self).__name__}: {self}"


def _rebuild(kind: type[EpochalError], what: str, where: str | None, fix: str | None, code: str | None) -> EpochalError:
    return kind(what, where=where, fix=fix, code=code)


class PlanError(EpochalError):
    """An option of the plan cannot be right; ``mistakes`` lists them where there are several."""

    exit_code = 2
    mistakes: Sequence[EpochalError] = ()

    @classmethod
    def of(cls, mistakes: Sequence[EpochalError]) -> EpochalError:
        """The one mistake itself, or one error that lists them all."""
        every = [one for mistake in mistakes for one in getattr(mistake, "mistakes", ()) or (mistake,)]
        if len(every) == 1:
            return every[0]
        listed = "".join(f"\n- {mistake.describe()}".replace("\n  ", "\n    ") for mistake in every)
        error = cls(f"{len(every)} options of the plan cannot be right.{listed}")
        error.mistakes = tuple(every)
        return error


class UnknownNameError(PlanError):
    """A name that is not among the known ones."""

    @classmethod
    def of_name(cls, kind: str, given: object, known: Iterable[str], *, where: str | None = None) -> UnknownNameError:
        """Names the nearest known name and lists all of them; of many, the nearest few."""
        known = sorted(known)
        near = difflib.get_close_matches(str(given), known, n=1, cutoff=0.5)
        told = known if len(known) <= MANY else difflib.get_close_matches(str(given), known, n=8, cutoff=0.0)
        fix = (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(told) or 'none'}"
        fix += f", and {len(known) - len(told)} more" if len(told) < len(known) else ""
        return cls(f"{given!r} is not a known {kind}.", where=where, fix=fix)


class DataError(EpochalError):
    """The data are empty, ragged, of the wrong type, or cannot be read."""


class TableError(DataError):
    """A table, or a column of it, cannot be used."""


class WorkerError(DataError):
    """A process that loads data died, or did not answer in time."""


class ModelError(EpochalError):
    """The model and what it was given do not fit together."""


class LossError(EpochalError):
    """The loss cannot be computed, or is not a mean."""


class LossShapeError(LossError):
    """Outputs and targets have different shapes."""


class FaultError(EpochalError):
    """A mistake that the doctor can prove, told before it does harm; ``finding`` is an epochal.Finding."""

    finding: Any = None

    @classmethod
    def of(cls, finding: Any) -> FaultError:
        fix = f"{finding.fix}; if it is meant so: ignore=[{finding.code!r}]"
        error = cls(finding.what, where=f"{finding.where}; {finding.measured}", fix=fix, code=finding.code)
        error.finding = finding
        return error


class NonFiniteError(EpochalError):
    """A NaN or an infinity reached the loss or the gradients."""

    exit_code = 3


class CheckpointError(EpochalError):
    """A file of weights or a checkpoint cannot be read, or belongs to something else."""


class DiskFullError(CheckpointError):
    """There is no room for a checkpoint."""


class FileError(EpochalError):
    """A file cannot be written."""


class RunFolderError(EpochalError):
    """The run folder cannot be used."""


class RecipeError(EpochalError):
    """A recipe raised, or does not define ``plan``."""


class MissingPackageError(EpochalError):
    """An optional package is needed and not installed."""


class ProcessError(EpochalError):
    """One of several processes died, hangs, or went another way than the others."""

    is_relayed = False  # whether the text is what the process itself would have printed

    def describe(self) -> str:
        return str(self) if self.is_relayed else super().describe()


class Interrupted(EpochalError):
    """A signal ended a run of the command line; ``exit_code`` is 128 and its number, as shells count."""


class Mistakes:
    """Collects errors, so that all of them can be told at once.

    >>> mistakes = Mistakes()
    >>> with mistakes:
    ...     raise PlanError("lr must be above 0.")
    >>> mistakes.found
    [PlanError('lr must be above 0.')]
    """

    def __init__(self, found: Iterable[EpochalError] = ()) -> None:
        self.found = list(found)

    def __enter__(self) -> Mistakes:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, EpochalError):
            self.found.append(error)
            return True
        return False

    def tell(self) -> None:
        """Raises what was collected, if anything."""
        if self.found:
            raise PlanError.of(self.found)
