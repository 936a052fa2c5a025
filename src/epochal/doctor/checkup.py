"""The check of a plan: rules without a pass, over its data, over first passes, and over trials on copies."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING, Any

from epochal.copies import copied, untouched
from epochal.data.batch import rows
from epochal.data.loader import Loader
from epochal.data.workers import heard_while_awaited
from epochal.doctor.case import Case, noted
from epochal.doctor.finding import Finding, Seen, every, is_ignored, known, look, ordered
from epochal.doctor.probing import SECONDS, VAL, Probe, Trial
from epochal.doctor.rules.symptoms import goes_badly, has_learned, stands_still, update_ratio
from epochal.doctor.trace import Trace
from epochal.errors import EpochalError, FaultError, NonFiniteError
from epochal.losses import BINARY, CLASS_INDEX
from epochal.objective import relocate
from epochal.runtime import device as devices

if TYPE_CHECKING:
    from epochal.plan import Plan

PASSES = 3  # first batches; a warning has to be seen in all of them
WITHOUT_VAL: dict[str, Any] = {"val": None, "monitor": None, "metrics": None}
# Seconds after the beginning, after which no further batch is looked at, no rule over the data, trial or probe begins.
PASSES_UNTIL, DATA_UNTIL, TRIALS_UNTIL, PROBES_UNTIL = 2.5, 4.0, 6.0, 7.0


def checkup(plan: Plan) -> list[Finding]:
    """What is found, the most certain first. Nothing of the plan is changed."""
    began = time.perf_counter()
    with untouched(plan), heard_while_awaited():  # for batches of workers are left unread
        found = [one for one in _found(plan, began) if not is_ignored(one.code, plan.ignore)]
    return ordered(found)


def _found(plan: Plan, began: float) -> list[Finding]:
    try:
        copy_of = copied(plan, compile=False, ignore=("*",))
    except EpochalError as error:  # which says nothing of how it trains
        return [replace(one, level="info") for one in of_error(error)]
    try:
        run = copy_of.prepare()
    except EpochalError as error:
        return list(of_error(error))
    found: list[Finding] = []
    left_out: list[str] = []

    def looked(stage: str, over: Any, seconds: float = PROBES_UNTIL) -> list[Finding]:
        return look(stage, over, until=began + seconds, left_out=left_out)

    try:
        case = Case(plan, run, may_read=True)
        found += [*look("static", case), *look("settings", case)]
        if plan.step is None:
            failed = _first_passes(case, found, until=began + PASSES_UNTIL)
            if failed is not None:
                return [*found, *failed]
            found += looked("data", case, DATA_UNTIL)
        # Where reading takes long, a trial does without val.
        is_long = is_slow(case, (time.perf_counter() - began) / PASSES)
        left = max(0.3, began + TRIALS_UNTIL - time.perf_counter())
        trial = Trial(plan, (), seconds=min(SECONDS, left), **(WITHOUT_VAL if is_long else {}))
        found += trial.found
        probe = Probe(plan, case, trial)
        if plan.step is not None and trial.vitals.case is not None:
            case.passes = trial.vitals.case.passes
        if case.passes and plan.step is None:
            found += [*looked("dependence", probe), *looked("probe", probe)]
        elif plan.step is not None:
            found += _of_step(case, trial)
        found += _of_trials(plan, case, trial, began, found)
        is_known = any(one.stage == "trial" and one.level != "info" for one in found) or stands_still(trial.vitals)
        if not is_known and plan.step is None:
            found += looked("capacity", probe)
        if left_out:
            seen = Seen("the check ran out of time: some rules have not looked.", f"{len(left_out)} rules, after "
                        f"{time.perf_counter() - began:.0f} s", ", ".join(dict.fromkeys(left_out)),
                        "train, and look at what is told; or check with smaller data or a smaller model")  # fmt: skip
            found.append(_as_finding("out-of-time", seen, stage="other"))
        if isinstance(trial.error, NonFiniteError):
            found = _proved(found)
        if trial.last < 0.5 * trial.first:
            found = _mended(found)
    finally:
        run.train.close()
        if run.validation.loader is not None:
            run.validation.loader.close()
    return found


def _mended(found: list[Finding]) -> list[Finding]:
    """A loss that was too high at the start is no more than info where it has come down, and nothing else is ill."""
    if any(one.level != "info" and one.code != "initial-loss" for one in found):
        return found
    return [replace(one, level="info", stage="batch") if one.code == "initial-loss" else one for one in found]


def is_slow(case: Case, seconds: float) -> bool:
    """Whether an evaluation takes longer than a trial may spend on it. seconds: that a batch takes at most."""
    loader = case.run.validation.loader
    if loader is None or (isinstance(loader, Loader) and loader.is_in_memory and seconds < VAL / 4):
        return False  # it is made in large batches
    try:
        return len(loader) * seconds > VAL
    except TypeError:
        return True


def _first_passes(case: Case, found: list[Finding], until: float) -> list[Finding] | None:
    """Findings of the first batches into ``found``; what ended a pass, if something did."""
    run, counts, once = case.run, dict[str, int](), dict[str, Finding]()
    for module in run.state.modules:
        module.train()
    passes, number = 0, 0
    batches = islice(run.train.batches(epoch=0), PASSES)
    for number in range(PASSES):
        batch = None
        try:
            if (batch := next(batches, None)) is None:
                break
            batch = devices.move(batch, run.setting.device)
            with Trace(case.model) as trace, run.setting.autocast:
                loss = case.objective(case.model, copy.deepcopy(batch))
        except Exception as error:
            if batch is None and not isinstance(error, EpochalError):
                return [*once.values(), _raised(error, f"batch {number} of train was read")]
            return [*once.values(), *_explained(case, error, batch, number)]
        noted(case, batch, loss.value, loss.outputs, trace)
        here = [one for stage in ("wiring", "batch", "graph") for one in look(stage, case)]
        for one in here:
            counts[one.code] = counts.get(one.code, 0) + 1
            if one.code not in once or one.level == "error":
                once[one.code] = one
        passes += 1
        if time.perf_counter() > until:
            break
    found += [one for code, one in once.items() if one.level == "error" or counts[code] == passes]
    return None


def _explained(case: Case, error: Exception, batch: Any, number: int) -> list[Finding]:
    try:
        relocate(error, case.model, batch, f"batch {number} of train")
    except EpochalError as known_error:
        return of_error(known_error)
    except Exception as other:
        return [_raised(other, "; ".join(getattr(other, "__notes__", ())))]
    return []


def _raised(error: Exception, where: str) -> Finding:
    first = next(iter(str(error).strip().splitlines()), "")
    seen = Seen(f"{type(error).__name__} is raised: {first}", "", where, "mend it there")
    return _as_finding("raises", seen, stage="other")


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


def _of_step(case: Case, trial: Trial) -> list[Finding]:
    """What ended the trial of a step of the user's."""
    if trial.error is None or isinstance(trial.error, FaultError):
        return []
    return _explained(case, trial.error, None, len(trial.losses))


def _of_trials(plan: Plan, case: Case, trial: Trial, began: float, found: Sequence[Finding]) -> list[Finding]:
    """What trials at other rates tell of a trial that went badly."""
    if isinstance(trial.error, FaultError) or any(one.level == "error" for one in found):
        return []
    if trial.error is not None and not isinstance(trial.error, NonFiniteError):
        return list(of_error(trial.error)) if isinstance(trial.error, EpochalError) else []
    is_bad = trial.last is math.inf or (len(trial.losses) >= 8 and goes_badly(trial.losses))
    explained = any(one.level != "info" and one.stage not in ("capacity", "symptom") for one in found)
    if not is_bad or plan.step is not None or explained:
        return []
    others = {}
    for factor in _factors(case, trial):
        if time.perf_counter() - began < TRIALS_UNTIL:
            others[factor] = Trial(plan, ("*",), factor=factor, updates=max(30, len(trial.losses)), seconds=0.8)
    told = _compared(case, trial, others)
    is_known = stands_still(trial.vitals) or time.perf_counter() - began > TRIALS_UNTIL
    return told or ([] if is_known else _fitted(plan, case, trial))


def _factors(case: Case, trial: Trial) -> list[float]:
    """By what the rate is multiplied in other trials: what makes an update change the weights by a thousandth, too."""
    ratio = _update_ratio(case, trial)
    usual = 1e-3 / ratio if ratio > 0 else 1.0
    return [*([usual] if usual > 300 or usual < 1 / 300 else []), 0.01, 100.0, 0.1, 10.0]


def _update_ratio(case: Case, trial: Trial) -> float:
    """By how much of themselves an update changes the weights, in the median; NaN where that is not known."""
    names = [name for name, p in case.trained.items() if p.dim() > 1]
    ratios = [ratio for look in trial.vitals.looks if math.isfinite(ratio := update_ratio(look, names)) and ratio > 0]
    return median(ratios) if ratios else math.nan


def _fitted(plan: Plan, case: Case, trial: Trial) -> list[Finding]:
    """Whether sixteen samples can be learned by heart, where more could not."""
    few = first_rows(case, 16) if _can_be_zero(case) else None
    if few is None or not math.isfinite(trial.first) or trial.first <= 0:
        return []
    lone = {
        "train": few, "val": None, "monitor": None, "batch_size": None, "shuffle": None, "accumulate": 1,
        "workers": None, "schedule": None, "epochs": 400, "max_steps": 400,
    }  # fmt: skip
    tried = [Trial(plan, ("*",), factor=factor, updates=400, seconds=0.7, **lone) for factor in (1.0, 10.0)]
    best = min(one.last for one in tried)
    if all(one.error is None for one in tried) and best > 0.5 * min(one.first for one in tried):
        seen = Seen(
            "the model cannot learn sixteen samples by heart.",
            f"of a loss of {tried[0].first:.4g} it keeps {best:.4g} after {max(len(one.losses) for one in tried)} "
            "updates on "
            "them alone, also at ten times the rate (half allowed)",
            f"{type(case.model).__name__}; {case.place}",
            "give it what it lacks to tell them apart: positions, wider layers, the input that the answer depends on",
        )
        return [_as_finding("cannot-fit", seen, None, "capacity")]
    return []


def _can_be_zero(case: Case) -> bool:
    """Whether the loss is one that falls to 0 where all is right."""
    loss, targets = getattr(case.objective, "loss", None), case.now.targets
    is_hard = case.kind not in BINARY or bool(((targets == 0) | (targets == 1)).all())
    is_index = case.kind not in CLASS_INDEX or not targets.is_floating_point()
    return case.kind is not None and is_hard and is_index and not getattr(loss, "label_smoothing", 0.0)


def first_rows(case: Case, count: int) -> Any:
    """The first samples of the first batch, as a batch of their own; None where it cannot be cut."""
    return rows(case.now.batch, slice(0, min(count, case.now.samples)), getattr(case.objective, "target", ()))


def _compared(case: Case, trial: Trial, others: dict[float, Trial]) -> list[Finding]:
    lower = [one for factor, one in others.items() if factor < 1]
    higher = [one for factor, one in others.items() if factor > 1]
    rate = _rate(case)
    start = next((one.losses[0] for one in (trial, *lower) if one.losses and math.isfinite(one.losses[0])), math.nan)
    best_low, best_high = (min(part, key=lambda one: one.last, default=None) for part in (lower, higher))
    reached = f"the loss went from {start:.4g} to {_told(trial.last)}"
    ratio = _update_ratio(case, trial)
    if best_low is not None and best_low.last < 0.8 * min(start, trial.last) and not ratio < 0.01:
        seen = Seen(
            "the learning rate is too high for this model.",
            f"{reached} at lr {rate:.3g}, and to {_told(best_low.last)} at {rate * best_low.factor:.3g} (a fifth "
            "less is enough to tell)",
            case.place,
            f"give lr={rate * best_low.factor:.1g}",
        )
        return [_as_finding("lr-too-high", seen)]
    can_move = not stands_still(trial.vitals) and not has_learned(trial.vitals)
    if best_high is not None and best_high.last < 0.8 * min(start, trial.last) and ratio < 3e-4 and can_move:
        seen = Seen(
            "the learning rate is too low for this model.",
            f"{reached} at lr {rate:.3g}, and to {_told(best_high.last)} at {rate * best_high.factor:.3g} (a "
            "fifth less is enough to tell)",
            case.place,
            f"give lr={rate * best_high.factor:.1g}",
        )
        return [_as_finding("lr-too-low", seen)]
    if trial.last is math.inf:
        seen = Seen(
            "the training leaves what is finite, at lower rates, too.",
            f"{reached} at lr {rate:.3g}; {getattr(trial.error, 'what', '')}",
            case.place,
            "give clip=1.0, and look at what takes a logarithm, a root or a quotient",
        )
        return [_as_finding("divergence", seen, "error", "symptom")]
    return []


def _as_finding(code: str, seen: Seen, level: str | None = None, stage: str = "trial") -> Finding:
    one = next((one for one in every() if one.code == code and one.told == stage), known()[code])
    return Finding(code, level or one.level, seen.what, seen.measured, seen.where, one.why, seen.fix, None, stage)


def _proved(found: list[Finding]) -> list[Finding]:
    """Where a trial ended in what is not finite, that is proof: the likeliest cause of it is an error."""
    causes = [one for one in ordered(found) if one.level != "info"]
    return [replace(one, level="error") if causes and one.code == causes[0].code else one for one in found]


def _told(value: float) -> str:
    return "what is not finite" if not math.isfinite(value) else f"{value:.4g}"


def _rate(case: Case) -> float:
    return float(case.optimizer.param_groups[0]["lr"]) if case.optimizer is not None else math.nan
