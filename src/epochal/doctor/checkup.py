"""The check of a plan: rules without a pass, over its data, over first passes, and over trainings of copies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from epochal.copies import copied, untouched
from epochal.data.loader import Loader
from epochal.data.workers import heard_while_awaited
from epochal.doctor import rates
from epochal.doctor.case import Case, copy_of, noted
from epochal.doctor.finding import Finding, Seen, is_ignored, look, ordered
from epochal.doctor.probing import Probe
from epochal.doctor.raised import as_finding, of_anything, of_batch, of_error
from epochal.doctor.rules.symptoms import LEAST, stands_still
from epochal.doctor.trace import Trace
from epochal.doctor.trial import SECONDS, VAL, Trial
from epochal.errors import EpochalError, FaultError, NonFiniteError
from epochal.runtime import device as devices

if TYPE_CHECKING:
    from epochal.plan import Plan
    from epochal.run import Run

PASSES = 3  # first batches; a warning has to be seen in all of them
WITHOUT_VAL: dict[str, Any] = {"val": None, "monitor": None, "metrics": None}
# Seconds after the beginning, after which no further batch is looked at, no rule over the data, trial or probe begins.
PASSES_UNTIL, DATA_UNTIL, TRIALS_UNTIL, PROBES_UNTIL = 2.5, 4.0, 6.0, 7.0


def checkup(plan: Plan) -> list[Finding]:
    """What is found, the most certain first. Nothing of the plan is changed."""
    with untouched(plan), heard_while_awaited():  # for batches of workers are left unread
        check = Checkup(plan)
        try:
            copy_of = copied(plan, compile=False, ignore=("*",))
        except EpochalError as error:  # which says nothing of how it trains
            check.found = [replace(one, level="info") for one in of_error(error)]
        else:
            with check.prepared(copy_of) as run:
                if run is not None:
                    check.make(Case(plan, run, may_read=True))
    return ordered([one for one in check.found if not is_ignored(one.code, plan.ignore)])


@dataclass
class Checkup:
    """A check while it is made. found: so far. left_out: codes whose rules have not looked, for want of time."""

    plan: Plan
    began: float = field(default_factory=time.perf_counter)
    found: list[Finding] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Since it has begun."""
        return time.perf_counter() - self.began

    @contextmanager
    def prepared(self, copy_of: Plan) -> Iterator[Run | None]:
        """The run of a copy, which is not begun; None, and what is found, where it cannot be."""
        try:
            run = copy_of.prepare()
        except EpochalError as error:
            self.found += of_error(error)
            yield None
            return
        try:
            yield run
        finally:
            run.train.close()
            if run.validation.loader is not None:
                run.validation.loader.close()

    def make(self, case: Case) -> None:
        is_own = self.plan.step is not None
        self.found += [*look("static", case), *look("settings", case)]
        if not is_own:
            if not self._passes(case):
                return
            self._look("data", case, DATA_UNTIL)
        trial = self._trial(case)
        self.found += trial.found
        probe = Probe(self.plan, case, trial)
        if is_own:
            case.passes = trial.vitals.case.passes if trial.vitals.case is not None else []
        elif case.passes:
            self._look("dependence", probe)
            self._look("probe", probe)
        self.found += self._of_trial(case, trial)
        is_known = any(one.stage == "trial" and one.level != "info" for one in self.found) or stands_still(trial.vitals)
        if not is_known and not is_own:
            self._look("capacity", probe)
        self._tell_what_is_left_out(trial)
        if isinstance(trial.error, NonFiniteError):
            self.found = _proved(self.found)
        if trial.last < 0.5 * trial.first:
            self.found = _mended(self.found)

    def _look(self, stage: str, over: Case | Probe, until: float = PROBES_UNTIL) -> None:
        self.found += look(stage, over, until=self.began + until, left_out=self.left_out)

    def _passes(self, case: Case) -> bool:
        """Looks at the first batches: at warnings in all of them. False where one of them ended it."""
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
                    loss = case.objective(case.model, copy_of(batch))
            except Exception as error:
                is_read = batch is not None or isinstance(error, EpochalError)
                ended = of_batch(case, error, batch, number) if is_read else [
                    of_anything(error, f"batch {number} of train was read")]  # fmt: skip
                self.found += [*once.values(), *ended]
                return False
            noted(case, batch, loss.value, loss.outputs, trace)
            for one in [one for stage in ("wiring", "batch", "graph") for one in look(stage, case)]:
                counts[one.code] = counts.get(one.code, 0) + 1
                if one.code not in once or one.level == "error":
                    once[one.code] = one
            passes += 1
            if self.seconds > PASSES_UNTIL:
                break
        self.found += [one for code, one in once.items() if one.level == "error" or counts[code] == passes]
        return True

    def _trial(self, case: Case) -> Trial:
        """A training of the plan as it is; without val, where reading it takes long."""
        is_long = is_slow(case, self.seconds / PASSES)
        left = max(0.3, TRIALS_UNTIL - self.seconds)
        return Trial(self.plan, (), seconds=min(SECONDS, left), **(WITHOUT_VAL if is_long else {}))

    def _of_trial(self, case: Case, trial: Trial) -> list[Finding]:
        """What ended it, or why it went badly, where nothing that was found explains it."""
        if isinstance(trial.error, FaultError) or any(one.level == "error" for one in self.found):
            return []
        if trial.error is not None and not isinstance(trial.error, NonFiniteError):
            return of_batch(case, trial.error, None, len(trial.losses))
        explained = any(one.level != "info" and one.stage not in ("capacity", "symptom") for one in self.found)
        if not rates.is_bad(trial) or self.plan.step is not None or explained:
            return []
        return rates.causes(self.plan, case, trial, self.began + TRIALS_UNTIL)

    def _tell_what_is_left_out(self, trial: Trial) -> None:
        left_out = ", ".join(dict.fromkeys(self.left_out))
        told = [f"{len(self.left_out)} rules have not looked"] if left_out else []
        told += [f"of a training on a copy only {trial.cut} updates"] if 0 < trial.cut < LEAST else []
        if told:
            seen = Seen(
                "the check ran out of time: it has not seen all.",
                f"{', '.join(told)}, after {self.seconds:.0f} s",
                left_out or "how the loss goes on",
                "train, and look at what is told; or check with smaller data or a smaller model",
            )
            self.found.append(as_finding("out-of-time", seen, stage="other"))


def is_slow(case: Case, seconds: float) -> bool:
    """Whether an evaluation takes longer than a trial may spend on it. seconds: that a batch takes at most."""
    loader = case.run.validation.loader
    if loader is None or (isinstance(loader, Loader) and loader.is_in_memory and seconds < VAL / 4):
        return False  # it is made in large batches
    try:
        return len(loader) * seconds > VAL
    except TypeError:
        return True


def _proved(found: list[Finding]) -> list[Finding]:
    """Where a trial ended in what is not finite, that is proof: the likeliest cause of it is an error."""
    causes = [one for one in ordered(found) if one.level != "info"]
    return [replace(one, level="error") if causes and one.code == causes[0].code else one for one in found]


def _mended(found: list[Finding]) -> list[Finding]:
    """A loss that was too high at the start is no more than info where it has come down, and nothing else is ill."""
    if any(one.level != "info" and one.code != "initial-loss" for one in found):
        return found
    return [replace(one, level="info", stage="batch") if one.code == "initial-loss" else one for one in found]
