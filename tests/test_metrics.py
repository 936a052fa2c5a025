"""The named metrics against scikit-learn on real data, in whole and in pieces, and what ``metrics=`` may be."""

from __future__ import annotations

import itertools
import math
import pickle
from contextlib import contextmanager
from functools import lru_cache, reduce

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.datasets import load_diabetes, load_digits
from torchmetrics import classification as tm

from epochal.errors import DataError, PlanError, UnknownNameError
from epochal.metrics.metric import Metric, Stream, names_of
from epochal.metrics.named import NAMES, mode_of, resolve

CLASSES = ["accuracy", "top5", "precision", "recall", "f1", "confusion"]
RATES = ["accuracy", "precision", "recall", "f1"]
REGRESSION = ["mae", "mse", "rmse", "r2"]


@lru_cache
def digits():
    """Scores of the nearest class mean: real scores, right for about nine in ten. (1797, 10) and (1797,)."""
    images, labels = load_digits(return_X_y=True)
    means = np.stack([images[labels == digit].mean(0) for digit in range(10)])
    return torch.tensor(images @ means.T - (means**2).sum(1) / 2).float(), torch.tensor(labels)


@lru_cache
def diabetes():
    """Least squares of two columns, the disease and the blood pressure: (442, 2) outputs and targets."""
    features, disease = load_diabetes(return_X_y=True)
    targets = np.stack([disease, features[:, 3]], axis=1)
    inputs = np.column_stack([features[:, :3], features[:, 4:], np.ones(len(features))])
    return torch.tensor(inputs @ np.linalg.lstsq(inputs, targets, rcond=None)[0]), torch.tensor(targets)


@lru_cache
def bits():
    """The four bits of each digit, from the pixels by least squares: (1797, 4) logits and 0/1 targets."""
    images, labels = load_digits(return_X_y=True)
    targets = (labels[:, None] >> np.arange(4)) & 1
    return torch.tensor(images @ np.linalg.lstsq(images, targets - 0.5, rcond=None)[0]), torch.tensor(targets).float()


def row_of(names, outputs, targets, loss, cuts=(), **options):
    stream, edges = Stream(resolve(names, loss=loss, **options)), [0, *sorted(cuts), len(targets)]
    for start, stop in itertools.pairwise(edges):
        stream.update(outputs[start:stop], targets[start:stop])
    return stream.compute()


def sk_classes(predicted, truth, average="macro"):
    options = {"average": average, "zero_division": 0}
    return {
        "accuracy": float(np.mean(truth == predicted)),
        "precision": sk.precision_score(truth, predicted, **options),
        "recall": sk.recall_score(truth, predicted, **options),
        "f1": sk.f1_score(truth, predicted, **options),
    }


def sk_regression(outputs, targets):
    return {
        "mae": sk.mean_absolute_error(targets, outputs),
        "mse": sk.mean_squared_error(targets, outputs),
        "rmse": math.sqrt(sk.mean_squared_error(targets, outputs)),
        "r2": sk.r2_score(targets, outputs),
    }


def same(row, expected):
    assert row.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, list):
            assert row[name] == value
        else:
            assert row[name] == pytest.approx(value, rel=1e-12, nan_ok=True), name


@contextmanager
def fails(kind, what, fix, where="metrics"):
    """An error of this kind with exactly this text."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.value.describe() == f"{kind.__name__}: {what}\n  where: {where}\n  fix:   {fix}"


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 1797), max_size=6))
def test_classes_are_as_scikit_learn_has_them_however_the_batches_are_cut(cuts):
    scores, labels = digits()
    predicted, truth = scores.argmax(1).numpy(), labels.numpy()
    expected = sk_classes(predicted, truth)
    expected["top5"] = sk.top_k_accuracy_score(truth, scores.numpy(), k=5)
    expected["confusion"] = sk.confusion_matrix(truth, predicted).tolist()
    same(row_of(CLASSES, scores, labels, "cross_entropy", cuts), expected)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 442), max_size=6))
def test_regression_is_as_scikit_learn_has_it_however_the_batches_are_cut(cuts):
    outputs, targets = diabetes()
    same(row_of(REGRESSION, outputs, targets, "mse", cuts), sk_regression(outputs.numpy(), targets.numpy()))
    disease = outputs[:, 0], targets[:, 0]
    same(row_of(REGRESSION, *disease, "mse", cuts), sk_regression(*(part.numpy() for part in disease)))
    folded = row_of("r2", outputs.view(221, 2, 2), targets.view(221, 2, 2), "mse", [100])
    same(folded, {"r2": sk.r2_score(targets.view(221, 4), outputs.view(221, 4))})


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(7)), st.integers(1, 6))
def test_sums_may_be_merged_in_any_order_and_grouping(order, middle):
    cases = [(CLASSES, *digits(), "cross_entropy"), (REGRESSION, *diabetes(), "mse")]
    for names, outputs, targets, loss in cases:
        for metric in resolve(names, loss=loss):
            parts = [metric.sums(a, b) for a, b in zip(outputs.tensor_split(7), targets.tensor_split(7))]
            parts = [parts[i] for i in order]
            merged = metric.merge(reduce(metric.merge, parts[:middle]), reduce(metric.merge, parts[middle:]))
            whole = metric.value(metric.sums(outputs, targets))
            if metric.name == "confusion":
                assert metric.value(merged) == whole
            else:
                assert metric.value(merged) == pytest.approx(whole, rel=1e-12)


def test_classes_over_a_sequence():
    scores, labels = digits()
    outputs, targets = scores[:1795].view(359, 5, 10).transpose(1, 2), labels[:1795].view(359, 5)
    same(row_of(CLASSES, outputs, targets, "cross_entropy", [100]), row_of(CLASSES, scores[:1795], labels[:1795], None))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_ignored_targets_do_not_count_for_any_integer_type(dtype):
    scores, labels = digits()
    masked, keep = labels.clone(), torch.arange(1797) % 3 != 0
    masked[~keep] = 255
    row = row_of(CLASSES, scores, masked.to(dtype), "cross_entropy", [500], ignore_index=255)
    same(row, row_of(CLASSES, scores[keep], labels[keep], "cross_entropy"))
    # as an unsigned byte, -100 is 156: a class 156 must still count
    many = torch.eye(200)[torch.tensor([156, 3])]
    assert row_of("accuracy", many, torch.tensor([156, 3]).to(dtype), "cross_entropy") == {"accuracy": 1.0}


def test_a_batch_without_anything_to_count_changes_nothing():
    scores, labels = digits()
    stream = Stream(resolve(CLASSES, loss="nll"))
    stream.update(scores, torch.full_like(labels, -100))
    assert math.isnan(stream.compute()["accuracy"]) and math.isnan(stream.compute()["f1"])
    stream.update(scores, labels)
    stream.update(scores[:0], labels[:0])
    same(stream.compute(), row_of(CLASSES, scores, labels, "nll"))


def test_probabilities_as_targets_of_cross_entropy_mean_their_largest():
    scores, labels = digits()
    smooth = torch.nn.functional.one_hot(labels, 10) * 0.9 + 0.01
    same(row_of(CLASSES, scores, smooth, "cross_entropy"), row_of(CLASSES, scores, labels, "cross_entropy"))


def test_only_classes_that_appear_are_averaged_and_zero_by_zero_is_zero():
    scores = torch.eye(5)[[0, 0, 1, 4]]
    truth = torch.tensor([0, 1, 1, 2])  # 3 does not appear; 4 is predicted and never true, 2 the reverse
    same(row_of(RATES, scores, truth, None), sk_classes(np.array([0, 0, 1, 4]), truth.numpy()))


@pytest.mark.parametrize("output_shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("target_shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_binary_of_logits_and_of_probabilities(output_shape, target_shape, dtype):
    logits, odd = (part[:, 0] for part in bits())
    expected = sk_classes((logits > 0).int().numpy(), odd.numpy(), average="binary")
    outputs, targets = logits.view(output_shape), odd.to(dtype).view(target_shape)
    same(row_of(RATES, outputs, targets, "bce_with_logits", [7, 1000]), expected)
    same(row_of(RATES, outputs, targets, None), expected)
    same(row_of(RATES, outputs.sigmoid(), targets, "bce"), expected)
    same(row_of(RATES, outputs, targets * 0.8 + 0.1, "bce_with_logits"), expected)  # smoothed labels
    same(row_of(RATES, outputs + 0.5, targets, "mse"), expected)  # least squares aims at the targets themselves
    matrix = sk.confusion_matrix(odd.numpy(), (logits > 0).numpy()).tolist()
    assert row_of("confusion", outputs, targets, None) == {"confusion": matrix}


@pytest.mark.parametrize("extra", [(), (1,)])
def test_several_labels_are_elementwise_for_accuracy_and_a_mean_over_labels_for_the_rates(extra):
    logits, truth = bits()
    expected = sk_classes((logits > 0).int().numpy(), truth.int().numpy())
    logits, truth = logits.view(-1, 4, *extra), truth.view(-1, 4, *extra)
    same(row_of(RATES, logits, truth, "bce_with_logits", [3, 900]), expected)
    same(row_of(RATES, logits.sigmoid(), truth.bool(), "bce", [1]), expected)
    halves = torch.cat([truth, torch.full_like(truth, -1)]), torch.cat([logits, -logits])
    same(row_of(RATES, halves[1], halves[0], "bce_with_logits", ignore_index=-1), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_outputs_are_widened_before_they_are_summed(dtype):
    outputs, targets = (part[:, 0].to(dtype) for part in diabetes())
    wide = sk_regression(outputs.double().numpy(), targets.double().numpy())
    same(row_of(REGRESSION, outputs, targets, "mse", [50]), wide)
    scores, labels = digits()
    assert row_of("accuracy", scores.to(dtype), labels, "cross_entropy")["accuracy"] > 0.85


def test_complex_outputs_are_compared_by_the_modulus_of_the_difference():
    outputs, targets = torch.tensor([3 + 4j, 0j]), torch.tensor([0j, 0j])
    assert row_of(REGRESSION[:3], outputs, targets, "mse") == {"mae": 2.5, "mse": 12.5, "rmse": math.sqrt(12.5)}
    fix, where = "take mse, or give torch.view_as_real of both", "metrics; outputs (2,), targets (2,)"
    with fails(DataError, "r2 is for real numbers.", fix, where):
        row_of("r2", outputs, targets, "mse")


def test_r2_loses_nothing_where_the_mean_is_large():
    outputs, targets = (part[:, 0] for part in diabetes())
    mean, std = targets.mean(), targets.std()
    outputs, targets = ((part - mean) / std for part in (outputs, targets))
    moved = row_of("r2", outputs + 1e9, targets + 1e9, "mse", range(1, 442))  # one sample a batch
    assert moved["r2"] == pytest.approx(sk.r2_score(targets.numpy(), outputs.numpy()), abs=1e-6)


def test_r2_of_constant_targets_few_rows_and_nan():
    constant = torch.full((30,), 0.1, dtype=torch.float64)
    assert row_of("r2", constant, constant, "mse", [7, 8]) == {"r2": 1.0}
    assert row_of("r2", constant + 1, constant, "mse", [7, 8]) == {"r2": 0.0}
    assert math.isnan(row_of("r2", constant[:1], constant[:1], "mse")["r2"])
    outputs, targets = (torch.column_stack([part[:30], constant]) for part in diabetes())
    same(row_of("r2", outputs, targets, "mse", [4]), {"r2": sk.r2_score(targets.numpy(), outputs.numpy())})
    for bad in (math.nan, math.inf):
        targets = torch.tensor([1.0, bad, 3.0])
        assert math.isnan(row_of("r2", torch.ones(3), targets, "mse")["r2"])
        assert not math.isfinite(row_of("r2", targets, torch.tensor([1.0, 2.0, 3.0]), "mse")["r2"])


def test_counts_are_exact_beyond_float32():
    many = 2**24
    for metric in resolve([*RATES, "confusion", "mae", "mse"], loss=None):
        outputs, targets = torch.zeros(1), torch.zeros(1)
        sums = metric.sums(outputs, targets)
        assert sums.dtype in (torch.int64, torch.float64)
        assert (metric.merge(sums * many, sums) == sums * (many + 1)).all()


def collection(**options):
    return torchmetrics.MetricCollection([tm.MulticlassRecall(10), tm.MulticlassAUROC(10)], **options)


def bias(outputs, targets):
    return (outputs - targets).mean()


def test_a_function_is_a_mean_over_samples():
    outputs, targets = diabetes()
    row = row_of([bias, "mae"], outputs + 1, targets, "mse", [5, 400])
    assert row["bias"] == pytest.approx(1) and list(row) == ["bias", "mae"]
    host = row_of({"n": lambda outputs, targets: float(len(outputs)), "b": bias}, outputs, targets, "mse", [42])
    assert host["n"] == (42 * 42 + 400 * 400) / 442
    stream = Stream(resolve(bias, loss=None))
    stream.update(outputs[:0], targets[:0])  # its mean is NaN, of no samples
    stream.update(outputs + 1, targets)
    assert stream.compute()["bias"] == pytest.approx(1)


def test_outputs_may_be_a_dict_for_a_function_and_targets_none():
    stream = Stream(resolve({"energy": lambda outputs, targets: outputs["e"].mean()}, loss=None))
    stream.update({"e": torch.tensor([1.0, 2.0, 3.0])}, None)
    stream.update({"e": torch.tensor([6.0])}, None)
    assert stream.compute() == {"energy": 3.0}


def test_what_may_be_written_as_metrics():
    own = Metric("zero", sums=lambda outputs, targets: torch.zeros(1), value=lambda sums: float(sums))
    assert resolve(None, loss=None) == [] and resolve([], loss=None) == []
    assert names_of(resolve("f1", loss=None)) == names_of(resolve(("f1",), loss=None)) == ["f1"]
    assert names_of(resolve({"a": "f1", "b": own, "c": bias}, loss=None)) == ["a", "b", "c"]
    assert names_of(resolve([own, tm.MulticlassF1Score(num_classes=3), torchmetrics.R2Score()], loss=None)) == [
        "zero",
        "multiclass_f1_score",
        "r2_score",
    ]
    keys = ["MulticlassAUROC", "MulticlassRecall"]
    assert sorted(names_of(resolve([collection()], loss=None))) == keys
    assert sorted(names_of(resolve({"c": collection(postfix="_x")}, loss=None))) == [f"c_{key}_x" for key in keys]
    assert names_of(resolve(list(NAMES), loss=None)) == list(NAMES)
    for metric in pickle.loads(pickle.dumps(resolve([*NAMES, bias], loss=None))):  # worker processes get them so
        assert isinstance(metric, Metric)


def test_the_better_direction():
    modes = {name: mode_of(resolve(name, loss=None)[0]) for name in NAMES}
    assert [name for name, mode in modes.items() if mode == "min"] == ["mae", "mse", "rmse"]
    assert [name for name, mode in modes.items() if mode is None] == ["confusion"]
    assert mode_of(resolve(bias, loss=None)[0]) is None
    assert (
        mode_of(resolve(tm.BinaryF1Score(), loss=None)[0])
        == mode_of(resolve({"a": tm.BinaryF1Score()}, loss=None)[0])
        == "max"
    )
    assert mode_of(resolve(torchmetrics.MeanSquaredError(), loss=None)[0]) == "min"
    assert mode_of(resolve(collection(), loss=None)[0]) is None


KNOWN = "known: accuracy, confusion, f1, mae, mse, precision, r2, recall, rmse, top5"
GIVE = "give a name, an epochal.Metric, a torchmetrics metric, or a function f(outputs, targets)"
MISTAKES = [
    (["f1", "acuracy"], "'acuracy' is not a known metric.", f"did you mean 'accuracy'? {KNOWN}"),
    (["f1", "f1"], "two metrics have the name 'f1'.", 'name them yourself: metrics={"first": ..., "second": ...}'),
    (
        {"loss": "mse"},
        "a metric cannot have the name 'loss'.",
        "give it another name; train_loss and val_loss are the loss itself",
    ),
    (
        lambda outputs, targets: 0,
        "a metric function needs a name, and this one has none.",
        'give a dict: metrics={"name": function}',
    ),
    (
        {"short": lambda outputs: 0},
        "the metric function 'short' cannot be called with (outputs, targets): too many positional arguments.",
        "give it exactly two required parameters",
    ),
    ([3], "3 is not a metric.", GIVE),
    (tm.BinaryF1Score, "BinaryF1Score is a class, not a metric.", "write BinaryF1Score(...)"),
    ({3: "f1"}, "the name of a metric is a string; 3 is not one.", "give it a name"),
]


@pytest.mark.parametrize(("metrics", "what", "fix"), MISTAKES)
def test_mistakes_in_metrics(metrics, what, fix):
    with fails(UnknownNameError if "known" in what else PlanError, what, fix):
        resolve(metrics, loss=None)


WHICH = "outputs and targets do not say which class is meant."
LAYOUT = "give outputs (N, C, ...) and targets (N, ...) of class indices, or a function as the metric"
FLOATS = "class indices are integers; the targets are torch.float32."
FIVE = "top5 needs at least 5 classes; the outputs have "
LABELS = "confusion is for one class a sample; the outputs are several labels."
LEAVE = "leave top5 out; accuracy says more here"
SHAPES = "a metric compares outputs and targets of different shapes."
UNFIT = [  # name, loss, shape of the outputs, and of the targets; error, what, fix
    ("accuracy", None, (4, 3), (4, 3), DataError, WHICH, LAYOUT),
    ("recall", "nll", (4, 3), (4, 1), DataError, WHICH, LAYOUT),
    ("f1", "bce", (4,), (3,), DataError, WHICH, LAYOUT),
    ("f1", "nll", (4, 3), (4,), DataError, FLOATS, "give targets.long()"),
    ("top5", "cross_entropy", (4, 3), (4, 3), PlanError, FIVE + "3.", LEAVE),
    ("top5", "bce", (4, 7), (4, 7), PlanError, FIVE + "yes-or-no answers.", LEAVE),
    ("confusion", "bce", (4, 7), (4, 7), PlanError, LABELS, "take precision and recall"),
    ("mae", "l1", (4, 1), (4,), DataError, SHAPES, "give targets the shape (4, 1), for example targets.reshape(4, 1)"),
    ("mse", "mse", (4,), (4, 1), DataError, SHAPES, "give targets the shape (4,), for example targets.reshape(4,)"),
    ("r2", "mse", (4, 1), (1,), DataError, SHAPES, "give targets the shape (4, 1)"),
]


@pytest.mark.parametrize(("name", "loss", "outputs", "targets", "kind", "what", "fix"), UNFIT)
def test_outputs_and_targets_that_do_not_fit(name, loss, outputs, targets, kind, what, fix):
    where = f"metrics; outputs {outputs}, targets {targets}"
    if what == WHICH:
        where += f"; loss {loss or 'of your own'}"
    with fails(kind, what, fix, where):
        Stream(resolve(name, loss=loss)).update(torch.zeros(outputs), torch.zeros(targets))


def test_outputs_that_are_no_tensors_and_functions_that_give_no_scalar():
    what = "a named metric needs outputs and targets that are tensors; they are dict and NoneType."
    with fails(DataError, what, "give the metric as a function f(outputs, targets), or metrics=None"):
        Stream(resolve("mse", loss=None)).update({"a": torch.zeros(4)}, None)
    what = "the metric function 'raw' gave torch.float32 (4,), not one real number."
    with fails(DataError, what, "return the mean over the batch"):
        Stream(resolve({"raw": torch.sub}, loss=None)).update(torch.zeros(4), torch.zeros(4))


@pytest.mark.parametrize("name", ["precision", "confusion"])
def test_targets_outside_the_classes_are_told_when_the_value_is_asked_for(name):
    stream = Stream(resolve(name, loss="nll"))
    stream.update(torch.eye(3), torch.tensor([0, 3, -1]))
    what = "2 targets lie outside the classes 0 to 2."
    with fails(DataError, what, "number the classes from 0, and give the model one output a class"):
        stream.compute()


def test_a_number_of_columns_that_changes():
    stream = Stream(resolve("r2", loss="mse"))
    stream.update(torch.zeros(4, 3), torch.zeros(4, 3))
    what = "the sums of the metric 'r2' changed shape from (12,) to (8,)."
    with fails(DataError, what, "give the outputs of every batch the same number of classes or columns"):
        stream.update(torch.zeros(4, 2), torch.zeros(4, 2))
