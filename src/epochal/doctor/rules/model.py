"""Rules over the model: how its layers follow one another, how they begin, and which mode they are in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from epochal.doctor.case import Case, Pass
from epochal.doctor.finding import Seen, rule
from epochal.doctor.rules.wiring import named
from epochal.doctor.trace import Layer

LINEAR = (nn.Linear, nn.modules.conv._ConvNd)


@rule("missing-nonlinearity", "info", "batch")
def missing_nonlinearity(case: Case) -> Iterator[Seen]:
    """Two linear layers in a row are one linear layer: the second adds parameters, and nothing that can be learned.

    Looks at what the layers of the pass give and get: the output of an nn.Linear or a convolution is, unchanged, the
    input of another one, but for dropout. Exempt: a narrow middle (low rank, as in LoRA), grouped and 1x1 convolutions.
    It may be meant so; ``epochal check`` makes it a warning where both layers belong to one part of the model, and the
    training goes badly, or neighbours tell more of the targets than a linear model does.
    """
    if told := told_of_pairs(case):
        yield told[0]


def told_of_pairs(case: Case) -> tuple[Seen, bool] | None:
    """What is told of linear layers in a row, and whether two of one part are among them; None where there are none."""
    pairs = [(one, two) for one, two in _fed(case.now) if not _is_factored(one.module, two.module)]
    if not pairs:
        return None
    weights = [layer for layer in case.now.layers if isinstance(layer.module, LINEAR)]
    is_within = any(one.path.rpartition(".")[0] == two.path.rpartition(".")[0] for one, two in pairs)
    told = Seen(
        "linear layers follow one another with no activation between them.",
        f"{len(pairs)} of the {len(weights)} linear layers get the unchanged output of another one",
        ", ".join(f"{one.path} -> {two.path}" for one, two in pairs[:4]),
        "put an activation between them, nn.ReLU() say",
    )
    return told, is_within


def _fed(seen: Pass) -> Iterator[tuple[Layer, Layer]]:
    makers: dict[int, Layer] = {}
    for layer in (one for one in seen.layers if isinstance(one.module, (*LINEAR, _DropoutNd))):
        given = layer.input
        if isinstance(layer.module, _DropoutNd):  # what it gives is as linear as what it got
            before = makers.get(given.untyped_storage().data_ptr()) if given is not None else None
            if before is not None and isinstance(layer.output, Tensor) and layer.output is not given:
                made = before._replace(output=layer.output, output_version=layer.output_version)
                makers[layer.output.untyped_storage().data_ptr()] = made
            continue
        if given is not None:
            before = makers.get(given.untyped_storage().data_ptr())
            if before is not None and before.output_version == layer.input_version and _is_all(given, before.output):
                yield before, layer
        if isinstance(layer.output, Tensor):
            makers[layer.output.untyped_storage().data_ptr()] = layer


def _is_all(given: Tensor, output: Any) -> bool:
    return isinstance(output, Tensor) and given.numel() == output.numel()


def _is_factored(one: nn.Module, two: nn.Module) -> bool:
    before, middle = _sizes(one)
    _, after = _sizes(two)
    convolutions = [part for part in (one, two) if isinstance(part, nn.modules.conv._ConvNd)]
    is_separable = any(part.groups > 1 or set(part.kernel_size) == {1} for part in convolutions)
    return is_separable or middle < min(before, after)


def _sizes(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels


@rule("dropout", "error", "static")
def dropout(case: Case) -> Iterator[Seen]:
    """A dropout that drops everything, or nothing, or nearly everything, is not what was meant.

    Looks at p of the dropout layers: 1 is an error, above 0.8 a warning, above 0.5 is told as info (UMLAUT); and at the
    dropout of a recurrent network of one layer, which has no effect.
    """
    for path, module in case.model.named_modules():
        between = isinstance(module, nn.RNNBase | nn.MultiheadAttention) and getattr(module, "num_layers", 2) > 1
        p = module.p if isinstance(module, _DropoutNd) else module.dropout if between else 0.0
        if p > 0.5:
            level = "error" if p >= 1 else "warning" if p > 0.8 else "info"
            yield Seen(
                "dropout sets all of its inputs to 0." if p >= 1 else "dropout sets most of its inputs to 0.",
                f"p = {p:g} (0.5 is usual)",
                f"{path} ({type(module).__name__})",
                "give p=0.1 to 0.5: it is the share that is set to 0",
                level=level,
            )
        if isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers == 1:
            yield Seen(
                "the dropout of a recurrent network works between its layers, and it has one.",
                f"dropout={module.dropout:g}, num_layers=1",
                f"{path} ({type(module).__name__})",
                "put an nn.Dropout after it, or give num_layers=2",
                level="warning",
            )


@rule("dropout", "warning", "batch")
def dropout_called(case: Case) -> Iterator[Seen]:
    """A dropout that drops nearly everything: p is the share that is set to 0, not the one that is kept.

    Looks at the calls of F.dropout in the first passes: p is above 0.8.
    """
    for path, p in case.now.trace.dropped:
        if p > 0.8:
            yield Seen("dropout sets most of its inputs to 0.", f"p = {p:g} (0.5 is usual)",
                       f"F.dropout in {path or type(case.model).__name__}",
                       "give p=0.1 to 0.5: it is the share that is set to 0")  # fmt: skip
            return


@rule("batch-norm-of-one", "error", "batch")
def batch_norm_of_one(case: Case) -> Iterator[Seen]:
    """Batch norm divides by the deviation over the batch, and one sample has none: the last batch of an epoch ends
    the run.

    Looks at the number of samples, the batch size and drop_last, and at a batch norm in train mode that gets one number
    of each sample and channel.
    """
    lone = lone_sample(case)
    for layer in case.now.layers if lone else ():
        if isinstance(layer.module, _BatchNorm) and layer.is_training and len(layer.shape) > 1:
            each = math.prod(layer.shape[2:])
            if layer.shape[0] == case.now.samples and each == 1:
                yield Seen(
                    "the last batch of each epoch has one sample, on which batch norm cannot be trained.",
                    str(lone),
                    f"{layer.path} ({type(layer.module).__name__}), {case.place}",
                    "give another batch_size, or a DataLoader with drop_last=True",
                )
                return


def lone_sample(case: Case) -> str | None:
    """What leaves one sample for the last batch, in words; None where nothing does."""
    train = case.run.train
    loader = getattr(train, "loader", None)
    size = loader.batch_size if loader is not None else getattr(train, "batch_size", None)
    if train.samples is None or not size or size < 2 or case.run.setting.in_step:
        return None
    planned = case.run.started.steps
    is_reached = not planned or planned * case.run.accumulate > train.samples // size
    leaves_one = train.samples % size == 1 and is_reached
    return f"{train.samples} samples in batches of {size} leave 1" if leaves_one else None


@rule("tiny-batch-norm", "warning", "batch")
def tiny_batch_norm(case: Case) -> Iterator[Seen]:
    """Batch norm estimates mean and deviation from the batch; of two or three numbers they are noise.

    Looks at the batch norms in train mode that get fewer than 4 samples in every batch, and so fewer than 16 numbers of
    a channel.
    """
    for layer in case.now.layers:
        if isinstance(layer.module, _BatchNorm) and layer.is_training and len(layer.shape) > 1:
            samples, numbers = layer.shape[0], layer.shape[0] * math.prod(layer.shape[2:])
            if 1 < samples < 4 and all(one.samples == samples for one in case.passes[:1]):
                yield Seen(
                    "batch norm is trained on very small batches.",
                    f"{samples} samples in a batch (4 at least), {numbers} numbers of each channel",
                    f"{layer.path} ({type(layer.module).__name__})",
                    "give batch_size=16 or more, or take nn.GroupNorm, which does not look at the batch",
                )
                return


@rule("tiny-batch-norm", "warning", "static")
def odd_momentum(case: Case) -> Iterator[Seen]:
    """The momentum of torch's batch norm is the share of the new batch: in other libraries it is that of the old one.

    Looks at the momentum of each batch norm: above 0.8 the statistics are those of the last batch, below 0.001 they
    do not arrive in a thousand updates.
    """
    for path, module in case.model.named_modules():
        momentum = module.momentum if isinstance(module, _BatchNorm) and module.track_running_stats else None
        if module.training and momentum is not None and not 0.001 <= momentum <= 0.8:
            yield Seen(
                "batch norm hardly learns its statistics."
                if momentum < 0.5
                else "batch norm keeps the last batch alone.",
                f"momentum {momentum:g} (0.001 to 0.8 allowed; 0.1 is usual)",
                f"{path} ({type(module).__name__})",
                "leave momentum at 0.1: in torch it is the share of the new batch, 1 - that of Keras",
            )
            return


def _depends_on_mode(module: nn.Module) -> bool:
    is_dropout = isinstance(module, _DropoutNd) and module.p > 0
    return is_dropout or isinstance(module, _BatchNorm) or (isinstance(module, nn.RNNBase) and module.dropout > 0)


@rule("train-in-eval-mode", "warning", "batch")
def train_in_eval_mode(case: Case) -> Iterator[Seen]:
    """In eval mode dropout does nothing and batch norm keeps its old statistics: what is trained is another model.

    Looks at the layers whose mode matters, as they run in an update: in eval mode inside of a part that is in eval mode
    as a whole, though its weights are trained. Batch norms that alone were put into eval mode, and frozen parts, are
    left as they are on purpose.
    """
    modules = dict(case.model.named_modules())
    found = []
    for layer in case.now.layers:
        if layer.is_training or not _depends_on_mode(layer.module):
            continue
        parent = layer.path.rpartition(".")[0]
        part = modules.get(parent, case.model)
        whole = part if layer.path else case.model
        has_ran_training = any(one.is_training for one in case.now.layers if one.module is whole)
        trained = any(p.requires_grad for p in whole.parameters())
        if trained and not has_ran_training:
            found.append(layer)
    if found:
        yield Seen(
            "layers are in eval mode while they are trained.",
            f"{len(found)} of the layers whose mode matters",
            named(f"{layer.path} ({type(layer.module).__name__})" for layer in found),
            "call model.train() before the update, and .eval() only for what is frozen; do not set modes in the "
            "forward",
        )


def _over_samples(output: Tensor) -> float:
    """The deviation over the samples of a batch, in the mean of all units: what biases add to it is no difference."""
    values = output.detach()
    values = values.flatten(1)[:, :: -(-values[0].numel() // 4096)].float() if values.dim() > 1 else values.float()
    return values.std(0).mean().item() if values.dim() > 1 and len(values) > 1 else values.std().item()


@rule("init-scale", "info", "batch")
def init_scale(case: Case) -> Iterator[Seen]:
    """Where layers blow their inputs up, or let them fade, the first updates go into mending that.

    Looks at the deviation over samples of what linear layers and convolutions give, in the first pass: between the
    first and the last it grows or shrinks by more than 1000.
    """
    layers = [one for one in case.now.layers if isinstance(one.module, LINEAR) and isinstance(one.output, Tensor)]
    known = [(one, size) for one in layers if (size := _over_samples(one.output)) > 0]  # a layer may begin at 0
    if len(known) < 3 or case.run.state.progress.step > 2:
        return
    layers, sizes = zip(*known)
    if (ratio := max(sizes[-1] / sizes[0], sizes[0] / sizes[-1])) > 1000:
        yield Seen(
            "the layers blow their inputs up."
            if sizes[-1] > sizes[0]
            else "what the layers give fades from one to the next.",
            f"a deviation of {sizes[0]:.3g} in {layers[0].path}, of {sizes[-1]:.3g} in {layers[-1].path}: "
            f"{ratio:.3g} times (1000 allowed)",
            f"{layers[0].path} to {layers[-1].path}",
            "initialise with nn.init.kaiming_normal_(layer.weight), or put norms between the layers",
        )
