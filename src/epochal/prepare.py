"""From a plan to a run: device, data, optimizer, schedule, step, watchers, in this order."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from epochal import losses
from epochal.agreement import FACTS, Agreement
from epochal.cadence import Every, amount
from epochal.checkpoint import codec
from epochal.checkpoint.saver import Saver
from epochal.checkpoint.store import Checkpoints, Saving, look_for_room
from epochal.checkpoint.weights import refuse_unholdable, weights_of
from epochal.comparison import compared, refuse_different_plans
from epochal.data.batch import split
from epochal.data.loader import Loader
from epochal.data.share import Share
from epochal.data.window import Window
from epochal.describe import started, told_optimizer
from epochal.doctor.watch import Watch
from epochal.ending import Ending, Limits
from epochal.errors import Mistakes, ModelError, PlanError, UnknownNameError
from epochal.feeding import Data, read, steps_of
from epochal.graph import Graph
from epochal.loop import evaluation_mode
from epochal.metrics import named
from epochal.metrics.metric import Stream
from epochal.objective import Custom, Supervised
from epochal.observe.averages import TrainAverages
from epochal.observe.best import BestSoFar
from epochal.observe.console import Console
from epochal.observe.early_stopping import EarlyStopping
from epochal.observe.recorder import Recorder, claim
from epochal.optim import optimizers, schedules
from epochal.protocols import Stateful, Step, StepResult
from epochal.result import Setting, float_type
from epochal.resuming import about, resume
from epochal.run import Run
from epochal.runtime import compiler, processes, seeding
from epochal.runtime import device as devices
from epochal.runtime import precision as precisions
from epochal.runtime.compiler import Trust
from epochal.runtime.signals import Signals
from epochal.runtime.strategy import Strategy
from epochal.runtime.world import announced
from epochal.state import TrainState
from epochal.step import Update
from epochal.validation import Validation

if TYPE_CHECKING:
    from epochal.plan import Plan


def prepare(plan: Plan) -> Run:
    """Builds every part. What is wrong with data, optimizer, metrics and monitor is told at once."""
    strategy, world = Strategy.of(plan.strategy), announced()
    device = devices.choose(plan.device, world.local_rank if world.size > 1 else None)
    world = processes.join(device, strategy.patience)
    refuse_different_plans(plan)
    if plan.seed is not None:
        seeding.seed_everything(plan.seed)
    loss = losses.resolve(plan.loss) if plan.loss is not None else None
    modules = [plan.model, loss] if isinstance(loss, nn.Module) else [plan.model]
    for module in modules:
        module.to(device)
    mistakes, notes = Mistakes(), []
    with mistakes:
        _refuse_capture(plan, device)
    with mistakes:
        if plan.save is not None and plan.run is None:  # not before: the command line gives a recipe's plan its folder
            raise PlanError("save needs a run folder.", where=f"save={plan.save!r}, run=None", fix='give run="runs/x"')
    with mistakes:
        data = read(plan, losses.kind(loss), device, float_type(plan.model))
        notes = list(compared(data))
        _materialise(plan.model, data, device)
    with mistakes:
        agreement = _agreement(plan, strategy, modules, device) if world.size > 1 else None
        optimizer = _optimizer(plan, modules)
    with mistakes:
        metrics = named.resolve(plan.metrics, loss=losses.kind(loss), ignore_index=losses.ignore_index(loss))
        best = _best(plan, metrics, modules)
    mistakes.tell()

    limits = Limits(plan.epochs, plan.max_steps, amount(plan.max_time))
    trust = Trust()
    forward = compiler.Forward(plan.model, trust) if plan.compile else plan.model
    objective = _objective(plan, loss, data, data.train_targets)
    step = _step(plan, objective, forward, device, agreement, trust, keeps_outputs=bool(metrics))
    state = TrainState(
        plan.model, optimizer, loss=loss if isinstance(loss, nn.Module) else None, seed=data.seed,
        schedule=_schedule(plan, optimizer, steps_of(data.train, plan.accumulate, limits.epochs, limits.steps), best),
        scaler=precisions.scaler(plan.precision, device),
    )  # fmt: skip
    run = Run(
        state=state, step=step, train=data.train, accumulate=plan.accumulate, best=best,
        ending=Ending(limits, state, agreement=agreement), alike=data.alike,
        validation=_validation(plan, data, metrics),
        trust=trust,
        averages=TrainAverages(Stream(metrics)),
        setting=Setting(
            *_outside(agreement, forward, _objective(plan, loss, data, data.val_targets)), modules, device, metrics,
            precisions.autocast(plan.precision, device), data.batch_size, data.target, data.inputs, data.encoding,
            float_type(plan.model), in_step=agreement is not None and agreement.is_sharded,
        ),
        started=started(plan, state, data, device, best.monitor, losses.describe(loss or plan.objective or plan.step)),
    )  # fmt: skip
    if world.size > 1:  # before a resume, which has states for each
        seeding.diverge(world.rank, processes.first(seeding.digest))
    run.notes += notes
    if "*" not in plan.ignore and world.size == 1:
        run.watch = Watch(plan, run, ignore=plan.ignore)
        run.watch.begin()
    _observe(plan, run)
    return run


def _refuse_capture(plan: Plan, device: torch.device) -> None:
    if plan.compile == "graph" and device.type != "cuda":
        fix = "give compile=True: on the host little more than its kernels is called then"
        raise PlanError("a CUDA graph needs a CUDA device.", where=f'compile="graph", device={device}', fix=fix)


def _step(
    plan: Plan, objective: Any, forward: Callable, device: torch.device, agreement: Agreement | None, trust: Trust,
    *, keeps_outputs: bool,
) -> Step:  # fmt: skip
    if plan.step is not None:
        return _own(plan.step, device, agreement)
    options: dict[str, Any] = {"precision": plan.precision, "clip": plan.clip, "keeps_outputs": keeps_outputs}
    graph = None
    if plan.compile and plan.accumulate == 1 and plan.precision != "fp16" and agreement is None:
        graph = Graph(objective, plan.model, device, trust=trust, captures=plan.compile == "graph", **options)
    skips = plan.nonfinite == "skip"
    return Update(objective, forward, device, skip_nonfinite=skips, agreement=agreement, graph=graph, **options)


def _validation(plan: Plan, data: Data, metrics: list) -> Validation:
    every = Every.parse(plan.evaluate_every, where="evaluate_every")
    return Validation(data.val, Stream(metrics), every, is_ours=_is_ours(plan, data))


def _is_ours(plan: Plan, data: Data) -> bool:
    """Whether updates and evaluations run no code of the user's but the model."""
    names = [plan.metrics] if isinstance(plan.metrics, str) else plan.metrics or ()
    in_memory = data.val is None or (isinstance(data.val, Loader) and data.val.is_in_memory)
    known = isinstance(plan.loss, str) or losses.kind(plan.loss) is not None
    named = known and all(isinstance(name, str) for name in names)
    return in_memory and named and (plan.schedule is None or isinstance(plan.schedule, str | schedules.Schedule))


def _agreement(plan: Plan, strategy: Strategy, modules: list[nn.Module], device: torch.device) -> Agreement:
    """What joins several processes; their weights are the first one's from here on."""
    from epochal.runtime import parallel  # torch's engines, which one process does without

    if plan.step is None:
        return Agreement(parallel.engine(modules, device, strategy, plan.precision, 2 + FACTS))
    parallel.begin_alike(modules)
    return Agreement(None)


def _materialise(model: nn.Module, data: Data, device: torch.device) -> None:
    """Lazy layers learn their sizes from a first batch, before an optimizer is built over them."""
    lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if not lazy:
        return
    if not isinstance(data.train, Loader):  # looking into it would draw from the generators
        what = "the model has parameters without a shape."
        fix = "call the model once on a batch before fit, so that its lazy layers learn their sizes"
        raise ModelError(what, where=f"{', '.join(lazy[:3])} of {type(model).__name__}", fix=fix)
    batch = next(iter(data.train.batches(epoch=0)))
    batch = batch.batch if isinstance(batch, Share) else batch
    args, kwargs, _ = split(devices.move(batch, device), data.target)
    with evaluation_mode([model]):
        model(*args, **kwargs)


def _outside(agreement: Agreement | None, forward: Callable, objective: Any) -> tuple[Callable, Any]:
    """The model and the objective as they are called outside of an update: a sharded model by all processes at once."""
    if agreement is None or not agreement.is_sharded:
        return forward, objective
    call = agreement.engine.call  # type: ignore[union-attr]
    return partial(call, forward), objective and (lambda _, batch: call(objective, forward, batch))


def _own(step: Step, device: torch.device, agreement: Agreement | None) -> Step:
    """A user's step, which gets its batches on the run's device; when it has moved which weights, only it knows."""

    def whole(state: TrainState, window: Window) -> Any:
        if devices.moves(device):
            window = Window([devices.move(batch, device) for batch in window.batches], window.sizes, window.total)
        state.is_torn = True
        result = step(state, window)
        state.is_torn = False
        return result if agreement is None else _of_all(result, agreement)

    if hasattr(step, "settle"):
        whole.settle = step.settle  # type: ignore[attr-defined]
    whole.__name__ = getattr(step, "__name__", type(step).__name__)
    return whole


def _of_all(result: StepResult, agreement: Agreement) -> StepResult:
    """The means over all processes of what a user's step reports of its share."""
    if not isinstance(result, StepResult) or not isinstance(result.loss, torch.Tensor):
        return result  # which is told where it is in any run
    weight = float(result.weight)
    told = [value.item() * weight for value in (result.loss, *result.values.values())]
    missed, total, *sums = agreement.exchange(float(not result.applied), weight, *told)
    loss, *values = [torch.tensor(one / total if total else math.nan) for one in sums]
    return replace(result, loss=loss, weight=total, applied=not missed, values=dict(zip(result.values, values)))


def _optimizer(plan: Plan, modules: Sequence[nn.Module]) -> Any:
    if plan.step is not None and plan.optimizer is None:
        return None  # a step of the user's own may bring its optimizers
    return optimizers.build(plan.optimizer or "adam", modules, lr=plan.lr, weight_decay=plan.weight_decay)


def _schedule(plan: Plan, optimizer: Any, steps: int | None, best: BestSoFar) -> schedules.Scheduled | None:
    if plan.schedule is None:
        return None
    if optimizer is None:
        what = "a schedule moves the learning rate of an optimizer, and there is none."
        fix = "give optimizer= too, or step the schedule in your step"
        raise PlanError(what, where="schedule, optimizer=None", fix=fix)
    return schedules.build(plan.schedule, optimizer, epochs=plan.epochs, steps=steps, mode=best.mode)


def _objective(plan: Plan, loss: Any, data: Data, all_targets: Any) -> Any:
    """The Objective; None where there is only a step of the user's own."""
    if loss is not None:
        return Supervised(loss, kernel=losses.kernel(plan.loss), target=data.target, all_targets=all_targets)
    return Custom(plan.objective, data.target) if plan.objective is not None else None


def _best(plan: Plan, metrics: list, modules: list[nn.Module]) -> BestSoFar:
    stopping = plan.early_stopping or EarlyStopping()
    monitor, mode = _monitor(plan, stopping, metrics)
    restores = plan.restore_best if stopping.restore_best is None else stopping.restore_best
    keeps = modules if restores and plan.val is not None else ()
    return BestSoFar(monitor, mode, stopping.min_delta, keeps)


def _monitor(plan: Plan, stopping: EarlyStopping, metrics: list) -> tuple[str, str]:
    """The column that decides what is best, and which way it improves."""
    asked = {name for name in (plan.monitor, stopping.monitor) if name is not None}
    if len(asked) > 1:
        where = f"monitor={plan.monitor!r}, early_stopping monitors {stopping.monitor!r}"
        raise PlanError("two columns cannot both decide what is best.", where=where, fix="give one of them")
    sides = ("train", "val") if plan.val is not None else ("train",)
    modes = {"loss": "min", **{name: named.mode_of(one) for one in metrics for name in named.names_of([one])}}
    known = {f"{side}_{name}": mode for side in sides for name, mode in modes.items()}
    given = asked.pop() if asked else f"{sides[-1]}_loss"
    monitor = re.sub(r"^(eval|valid|validation|val)[_/]", "val_", re.sub(r"^(train|training)[_/]", "train_", given))
    if monitor not in known and not (plan.step is not None and monitor.startswith("train_")):
        raise UnknownNameError.of_name("column to monitor", given, known, where=f"monitor={given!r}")
    mode = stopping.mode or known.get(monitor, "min")
    if mode is None:
        what = f"nothing says whether a low or a high {monitor} is better."
        fix = f'give early_stopping=EarlyStopping(monitor={given!r}, mode="max") or mode="min"'
        raise PlanError(what, where=f"monitor={given!r}", fix=fix)
    return monitor, mode


def _observe(plan: Plan, run: Run) -> None:
    """Gives the run its observers and its folder, and what was saved before, if it is resumed."""
    folder, is_first = run.started.run, processes.world().is_first
    stopping = plan.early_stopping or (EarlyStopping(patience=plan.patience) if plan.patience else None)
    chosen = plan.observers if plan.observers is not None else [Console()]
    chosen = chosen if is_first else ()  # only the first process prints and writes
    extras: dict[str, Any] = {
        "best": run.best, "averages": run.averages, "data.train": run.train, "data.val": run.validation.loader,
        "early_stopping": stopping.fresh() if stopping else None, "step": plan.step or run.step,
        **_by_kind(chosen),
    }  # fmt: skip
    run.state.extras.update({name: one for name, one in extras.items() if isinstance(one, Stateful)})
    run.observers = [*([extras["early_stopping"]] if stopping else []), *chosen]
    if folder is None:
        return

    def take() -> None:
        run.lock = claim(folder, resume=plan.resume)

    processes.first(take)
    try:
        _record(plan, run, folder)
    except BaseException:
        if run.lock is not None:
            run.lock.release()
        raise


def _by_kind(observers: Sequence[Any]) -> dict[str, Any]:
    """Each by its type and its number among those of that type, so that another one beside it does not matter."""
    kinds = [type(one).__qualname__ for one in observers]
    return {f"observers.{kind}.{kinds[:i].count(kind)}": one for i, (kind, one) in enumerate(zip(kinds, observers))}


def _record(plan: Plan, run: Run, folder: Path) -> None:
    saving = Saving.of(plan.save)
    group = processes.aside(Strategy.of(plan.strategy).patience)
    checkpoints = Checkpoints(folder / "checkpoints", saving.keep, group)
    run.about = about(plan, run)
    run.saver, run.ending.signals = Saver(checkpoints, saving), Signals(terminate=True)
    if group.is_first:
        goes_on = saving.on_full == "continue"
        recorder = Recorder(
            folder, lambda: weights_of(plan.model), environment=run.about["environment"], goes_on=goes_on
        )
        run.observers = [recorder, *run.observers]  # first: another observer's error does not silence it
    state = run.state_dict()
    _, tensors = group.together(lambda: codec.encode(state))  # what cannot be saved is known before anything is trained
    refuse_unholdable(weights_of(plan.model), "train without run=, or make it a buffer with persistent=False")
    # The tensors as they are now, once more for best weights, and twice the trained ones, for what an optimizer keeps.
    trained = sum(p.nbytes for module in run.state.modules for p in module.parameters() if p.requires_grad)
    needed = 2 * sum(tensor.nbytes for tensor in tensors.values()) + 2 * trained + 2**16
    run.notes += group.first(lambda: list(look_for_room(needed, folder, saving)))
    if plan.resume:
        run.notes += resume(run, folder, checkpoints)
        run.started = replace(
            run.started, facts={**run.started.facts, "optimizer": told_optimizer(run.state.optimizer)}
        )
