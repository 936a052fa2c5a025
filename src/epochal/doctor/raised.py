"""Errors that end a pass or a training, as findings."""

from __future__ import annotations

from typing import Any

from epochal.doctor.case import Case
from epochal.doctor.finding import Finding, Seen, every, known
from epochal.errors import EpochalError, FaultError, NonFiniteError
from epochal.objective import relocate


def as_finding(code: str, seen: Seen, level: str | None = None, stage: str = "trial") -> Finding:
    """What no rule has seen, under a code that is known."""
    one = next((one for one in every() if one.code == code and one.told == stage), known()[code])
    return Finding(code, level or one.level, seen.what, seen.measured, seen.where, one.why, seen.fix, None, stage)


def of_error(error: EpochalError) -> list[Finding]:
    """An error that epochal raises by itself, as findings."""
    found = []
    for one in getattr(error, "mistakes", ()) or (error,):
        if isinstance(one, FaultError):
            found.append(one.finding)
            continue
        code = one.code or ("divergence" if isinstance(one, NonFiniteError) else "raises")
        why = known()[code].why if code in known() else ""
        what = one.what if code != "raises" else f"{type(one).__name__}: {one.what}"
        stage = "symptom" if isinstance(one, NonFiniteError) and code == "divergence" else "batch"
        stage = "other" if code == "raises" else stage
        found.append(Finding(code, "error", what, "", one.where or "", why, one.fix or "", None, stage))
    return found


def of_batch(case: Case, error: Exception, batch: Any, number: int) -> list[Finding]:
    """What was raised while the ``number``-th batch was worked on: where it comes from, if that is known."""
    try:
        relocate(error, case.model, batch, f"batch {number} of train")
    except EpochalError as known_error:
        return of_error(known_error)
    except Exception as other:
        return [of_anything(other, "; ".join(getattr(other, "__notes__", ())))]
    return []


def of_anything(error: Exception, where: str) -> Finding:
    """An error that is not epochal's."""
    first = next(iter(str(error).strip().splitlines()), "")
    seen = Seen(f"{type(error).__name__} is raised: {first}", "", where, "mend it there")
    return as_finding("raises", seen, stage="other")
