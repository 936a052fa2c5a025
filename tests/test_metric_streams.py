"""Means and streams: what they cost, that they never wait, torchmetrics inside them, and restarts."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
import torchmetrics
from sklearn.datasets import load_diabetes, load_digits
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import classification as tm
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric, Running

from epochal.checkpoint import codec
from epochal.errors import CheckpointError
from epochal.metrics.metric import Mean, Stream
from epochal.metrics.named import resolve

CLASSES = ["accuracy", "top5", "precision", "recall", "f1", "confusion"]
REGRESSION = ["mae", "mse", "rmse", "r2"]


@lru_cache
def digits():
    """Scores of the nearest class mean: real scores, right for about nine in ten. (1797, 10) and (1797,)."""
    images, labels = load_digits(return_X_y=True)
    means = np.stack([images[labels == digit].mean(0) for digit in range(10)])
    return torch.tensor(images @ means.T - (means**2).sum(1) / 2).float(), torch.tensor(labels)


def row_of(metrics, scores, labels, sizes=(1797,)):
    stream = Stream(resolve(metrics, loss="cross_entropy"))
    for batch in zip(scores.split(sizes), labels.split(sizes)):
        stream.update(*batch)
    return stream.compute()


class Recorded(TorchDispatchMode):
    """Notes every operation of torch, and fails on those that wait for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(self.WAITING), name
        self.ops.append(name)
        return func(*args, **(kwargs or {}))


def test_no_metric_waits_for_the_device():
    scores, labels = digits()
    logits, truth = scores[:, :4] - scores[:, :4].mean(), torch.nn.functional.one_hot(labels, 10)[:, :4].float()
    cases = [
        (CLASSES, scores, labels, "cross_entropy"),
        (CLASSES[2:], logits[:, 0], truth[:, 0], None),
        (["accuracy", "f1"], logits, truth, "bce_with_logits"),
        (REGRESSION, logits, truth, "mse"),
        ({"bias": lambda outputs, targets: (outputs - targets).mean()}, logits, truth, None),
    ]
    for names, outputs, targets, loss in cases:
        stream = Stream(resolve(names, loss=loss))
        with Recorded():
            stream.update(outputs, targets)
            stream.update(outputs, targets)


def test_precision_recall_and_f1_share_their_sums():
    scores, labels = digits()
    one, three = (Stream(resolve(names, loss=None)) for names in (["f1"], ["f1", "recall", "precision"]))
    counted = []
    for stream in (one, three):
        with Recorded() as recorded:
            stream.update(scores, labels)
        counted.append(len(recorded.ops))
    assert counted[0] == counted[1]


def test_a_mean_is_weighted_and_costs_one_addition():
    mean, value = Mean(), torch.tensor(2.0, requires_grad=True)
    assert math.isnan(mean.compute())
    mean.update(value, 3)
    mean.update(torch.tensor(4.0), torch.tensor(1))
    assert mean.compute() == 2.5
    elsewhere, value = (
        Mean(),
        torch.tensor(2.0, requires_grad=True, device="meta"),
    )  # no device of its own, but not the host
    elsewhere.update(value, 3)
    with Recorded() as recorded:
        elsewhere.update(value, 3)
    assert recorded.ops == ["detach", "add_"]
    mean.reset()
    assert math.isnan(mean.compute())


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
def test_a_weight_of_zero_adds_nothing_and_a_nan_with_a_weight_stays(zero):
    mean = Mean()
    mean.update(torch.tensor(math.nan), zero)
    assert math.isnan(mean.compute())
    mean.update(torch.tensor(2.0), 5)
    mean.update(torch.tensor(math.inf), zero)
    assert mean.compute() == 2.0
    mean.update(torch.tensor(math.nan), zero + 1)
    assert math.isnan(mean.compute())


def test_a_mean_of_narrow_values_is_summed_in_float64():
    mean = Mean()
    for _ in range(1000):
        mean.update(torch.tensor(1.0078125, dtype=torch.bfloat16), 3)
        mean.update(torch.tensor(1.0078125, dtype=torch.bfloat16), torch.tensor(3))
    assert mean.compute() == 1.0078125


def test_a_mean_counts_exactly_beyond_float32():
    mean, many = Mean(), 2**24
    mean.update(torch.tensor(1.0), many)
    mean.update(torch.tensor(0.0), np.float32(1))
    mean.update(torch.tensor(1.0), torch.tensor(many))
    mean.update(torch.tensor(0.0), torch.tensor(1.0))
    assert mean.compute() == 2 * many / (2 * many + 2)


def test_a_mean_goes_on_from_its_state():
    losses = torch.tensor(load_diabetes().target).float()
    whole, first = Mean(), Mean()
    for i, loss in enumerate(losses):
        weight = i if i % 2 else torch.tensor(i)
        whole.update(loss, weight)
        if i < 200:
            first.update(loss, weight)
    state = first.state_dict()
    first.update(torch.tensor(1e9), 1)  # does not change the state
    state = through_a_checkpoint(state)
    second = Mean()
    second.load_state_dict(state)
    for i, loss in enumerate(losses[200:], start=200):
        second.update(loss, i if i % 2 else torch.tensor(i))
    assert second.compute() == whole.compute()


def through_a_checkpoint(state):
    tree, tensors = codec.encode(state)
    return codec.decode(codec.loads(codec.dumps(tree)), {name: tensor.clone() for name, tensor in tensors.items()})


def collection(**options):
    average = {"num_classes": 10, "average": "macro"}
    rates = [tm.MulticlassPrecision(**average), tm.MulticlassRecall(**average)]
    return torchmetrics.MetricCollection([*rates, tm.MulticlassAUROC(num_classes=10)], **options)


def foreign_metrics():
    accuracy = {"num_classes": 10, "average": "micro"}
    return {
        "own": "f1",
        "accuracy": tm.MulticlassAccuracy(**accuracy),
        "matrix": tm.MulticlassConfusionMatrix(num_classes=10),
        "all": collection(),
        "extremes": MinMaxMetric(tm.MulticlassAccuracy(**accuracy)),
        "recent": Running(tm.MulticlassAccuracy(**accuracy), window=3),
        "each": ClasswiseWrapper(tm.MulticlassRecall(num_classes=10, average=None)),
        "double": tm.MulticlassAccuracy(**accuracy) * 2,
    }


def test_torchmetrics_give_the_values_of_ours():
    scores, labels = digits()
    row = row_of(foreign_metrics(), scores, labels, (50, 900, 847))
    ours = row_of(CLASSES, scores, labels)
    assert row["accuracy"] == pytest.approx(ours["accuracy"], abs=1e-6)
    assert row["double"] == pytest.approx(2 * ours["accuracy"], abs=1e-6)
    assert row["own"] == ours["f1"] and row["matrix"] == ours["confusion"]
    assert row["all_MulticlassRecall"] == pytest.approx(ours["recall"], abs=1e-6)
    assert row["extremes_raw"] == row["extremes_max"] == row["accuracy"]
    recalls = [row[f"each_multiclassrecall_{digit}"] for digit in range(10)]
    assert sum(recalls) / 10 == pytest.approx(ours["recall"], abs=1e-6)
    assert all(type(value) in (float, list) for value in row.values())


def test_a_stream_goes_on_from_its_state_as_if_nothing_had_happened():
    scores, labels = digits()
    batches = list(zip(scores.split(100), labels.split(100)))
    metrics = resolve(foreign_metrics(), loss="cross_entropy")
    whole, first, second = Stream(metrics), Stream(metrics), Stream(metrics)
    second.update(*batches[3])  # what it holds before is forgotten
    for i, batch in enumerate(batches):
        if i == 13:
            state = first.state_dict()
            first.update(*batches[0])  # does not change the state
            second.load_state_dict(through_a_checkpoint(state))
            assert second.compute() == whole.compute()
        stream = first if i < 13 else second
        whole.update(*batch)
        stream.update(*batch)
        if i in (4, 13, 17):
            assert stream.compute() == whole.compute()  # and gives MinMaxMetric something to remember
    assert leaves(second.state_dict()) == leaves(whole.state_dict())
    assert whole.compute()["recent"] == pytest.approx(sum(a.argmax(1).eq(b).sum() for a, b in batches[-3:]) / 297)


def leaves(state, path=""):
    if isinstance(state, dict):
        return {key: leaf for name in state for key, leaf in leaves(state[name], f"{path}/{name}").items()}
    if isinstance(state, list):
        return leaves(dict(enumerate(state)), path)
    return {path: state.tolist() if isinstance(state, torch.Tensor) else state}


def test_each_stream_has_a_copy_of_its_own_that_starts_empty():
    scores, labels = digits()
    metric = tm.MulticlassAccuracy(num_classes=10, average="micro")
    metric.update(scores, (labels + 1) % 10)
    train, val = Stream(resolve(metric, loss=None)), Stream(resolve(metric, loss=None))
    train.update(scores, labels)
    assert train.compute()["multiclass_accuracy"] > 0.85 and math.isnan(val.compute()["multiclass_accuracy"])
    assert metric.update_count == 1


def test_an_empty_stream_is_nan_without_a_warning_of_torchmetrics_and_so_is_one_that_was_reset():
    scores, labels = digits()
    stream = Stream(resolve([collection(prefix="c/"), "accuracy", tm.BinaryF1Score()], loss=None))
    names = ["c/MulticlassAUROC", "c/MulticlassPrecision", "c/MulticlassRecall", "accuracy", "binary_f1_score"]
    assert sorted(stream.compute()) == sorted(names) and all(map(math.isnan, stream.compute().values()))
    assert Stream([]).compute() == {}
    stream = Stream(resolve([collection(), "accuracy"], loss=None))
    stream.update(scores, labels)
    before = stream.compute()
    stream.reset()
    assert stream.compute().keys() == before.keys() and all(map(math.isnan, stream.compute().values()))
    stream.load_state_dict(Stream([]).state_dict())  # nothing was counted: it fits any stream
    stream.update(scores, labels)
    assert stream.compute() == before


def test_a_state_of_other_metrics_is_refused_inside_an_epoch():
    scores, labels = digits()
    stream = Stream(resolve(["accuracy", collection()], loss=None))
    stream.update(scores, labels)
    with pytest.raises(CheckpointError) as caught:
        Stream(resolve("f1", loss=None)).load_state_dict(stream.state_dict())
    assert str(caught.value) == (
        "the checkpoint lies inside an epoch that counts the metrics MulticlassPrecision, MulticlassRecall,"
        " MulticlassAUROC, accuracy; this run has f1.\n  where: metrics\n"
        "  fix:   resume with the same metrics, and change them at the end of an epoch"
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_nothing_waits_and_the_values_are_the_same():
    scores, labels = digits()
    names = [*CLASSES, tm.MulticlassAccuracy(num_classes=10)]
    stream, mean = Stream(resolve(names[:6], loss="nll")), Mean()
    batches = [(a.cuda(), b.cuda()) for a, b in zip(scores.split(300), labels.split(300))]
    stream.update(*batches[0])
    mean.update(batches[0][0].mean(), 300)  # the first use moves it
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            stream.update(*batch)
            mean.update(batch[0].mean(), len(batch[0]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stream.compute() == row_of(CLASSES, scores, labels)
    assert mean.compute() == pytest.approx(scores.mean().item(), rel=1e-5)
    cuda, cpu = Stream(resolve(names, loss="nll")), Stream(resolve(names, loss="nll"))
    cuda.update(*batches[0])
    cpu.load_state_dict(through_a_checkpoint(cuda.state_dict()))  # a checkpoint may change devices
    cpu.update(scores[300:], labels[300:])
    assert cpu.compute() == row_of(names, scores, labels)
