"""How a program is judged: by epochal's check and its run, and by what plain torch raises or warns of."""

from __future__ import annotations

import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks.faults.program import Program

import epochal
from epochal import losses
from epochal.doctor.finding import Finding, ordered
from epochal.doctor.raised import of_error


@dataclass
class Verdict:
    """findings: of the check and of the run, the most certain first. is_checked: whether the check has the right one.
    steps, level: of the first right one that the run tells by itself, the updates before it and how surely; None where
    it tells none. seconds: of the check.
    """

    findings: list[Finding] = field(default_factory=list)
    is_checked: bool = False
    steps: int | None = None
    level: str | None = None
    seconds: float = 0.0


def by_epochal(program: Program) -> Verdict:
    """What its check finds, and then its run, as somebody would use both."""
    wanted = {program.cause, *program.also}
    began = time.perf_counter()
    try:
        plan = epochal.Plan(**program.make(), observers=())
        checked = plan.check()
    except epochal.EpochalError as error:
        found = of_error(error)
        return Verdict(found, any(one.code in wanted for one in found), seconds=time.perf_counter() - began)
    verdict = Verdict([], any(one.code in wanted for one in checked), seconds=time.perf_counter() - began)
    ran: list[Finding] = []

    def tells(found: list[Finding], steps: int) -> None:
        ran.extend(found)
        right = next((one for one in found if one.code in wanted), None)
        if right is not None and verdict.steps is None:
            verdict.steps, verdict.level = steps, right.level

    run = None
    try:
        with epochal.Plan(**program.make(), observers=()).prepare() as run:
            for event in run:
                if isinstance(event, epochal.Found):
                    tells([event.finding], run.state.progress.step)
    except epochal.EpochalError as error:
        tells(of_error(error), run.state.progress.step if run is not None else 0)
    except Exception:
        pass  # which everybody sees
    verdict.findings = ordered([*checked, *ran])
    return verdict


def by_torch(program: Program) -> str | None:
    """What a plain loop of 60 updates raises or warns of; None for nothing. A loss that becomes NaN is nothing: it only
    prints that.
    """
    options = program.make()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            _plain(options)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    known = [one for one in told if issubclass(one.category, UserWarning) and "torch" in str(one.filename)]
    return f"warns: {str(known[0].message).splitlines()[0]}" if known else None


def _plain(options: dict[str, Any]) -> None:
    """As it would be written by hand: epochal's own loader reads the data, and nothing else of it is used."""
    with suppress(epochal.EpochalError):
        options = {**options, "ignore": ("*",)}
    model, step = options["model"], options.get("step")
    names = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
    }
    given = options.get("optimizer")
    parameters = list(model.parameters())
    if given is None or isinstance(given, str):
        settings = {name: options[name] for name in ("lr", "weight_decay") if options.get(name) is not None}
        optimizer = names.get(given or "adam", torch.optim.Adam)(parameters, **settings)
    else:
        optimizer = given if isinstance(given, torch.optim.Optimizer) else given(parameters)
    loss, objective = options.get("loss"), options.get("objective")
    loss = losses.NAMES[loss]() if isinstance(loss, str) else loss
    model.train()
    for number, batch in enumerate(_batches(options)):
        if number >= 60:
            break
        if step is not None:
            from epochal.data.window import Window

            step(epochal.TrainState(model, optimizer), Window([batch], [len(batch[-1])]))
            continue
        optimizer.zero_grad()
        if objective is not None:
            value = objective(model, batch)
            value = value.value if isinstance(value, epochal.Loss) else value
        else:
            *inputs, targets = batch
            value = loss(model(*inputs), targets)
        value.backward()
        optimizer.step()


def _batches(options: dict[str, Any]) -> Any:
    train = options["train"]
    if isinstance(train, torch.utils.data.DataLoader):
        for _ in range(20):
            yield from train
    loader = epochal.Loader(train, options.get("batch_size") or 32, shuffle=options.get("shuffle") is not False)
    for epoch in range(20):
        yield from loader.batches(epoch)
