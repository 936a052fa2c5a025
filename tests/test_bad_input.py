"""What bad input gets: an error in three parts, before any weight has moved, asserted in full."""

import os
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import epochal

X = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
Y = X[:, :1]
C = torch.arange(64) % 3


def net(outputs=1):
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, outputs))


class Endless(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y))


def case(model, train, text, **options):
    return pytest.param(model, train, options, text.strip("\n"), id=text.strip().splitlines()[0][:70])


MSE = {"loss": "mse"}
CE = {"loss": "cross_entropy"}
CASES = [
    # the data
    case(net(), (X[:0], Y[:0]), **MSE, text="""
DataError: there are no samples.
  where: train
  fix:   give at least one sample"""),
    case(net(), (X, Y[:60]), **MSE, text="""
DataError: the arrays have different lengths.
  where: train[0] has 64, train[1] has 60
  fix:   give every array one entry for each sample"""),
    case(net(), (X, Y), **MSE, val=(X[:0], Y[:0]), text="""
DataError: there are no samples.
  where: val
  fix:   give at least one sample"""),
    case(net(), 3, **MSE, text="""
DataError: int is not something to train on.
  where: train
  fix:   give a tuple of arrays (X, y), a dict of arrays, a table or path with target=, a Dataset or a DataLoader"""),
    case(net(), iter([1]), **MSE, text="""
DataError: a list_iterator can be read only once.
  where: train
  fix:   wrap it in a torch.utils.data.IterableDataset whose __iter__ starts anew, or give a list"""),
    case(net(), (np.array(["a", "b"]), np.zeros(2)), **MSE, text="""
DataError: an array of <U1 cannot be trained on.
  where: train[0]
  fix:   turn it into numbers first (a table with target= does that for categories)"""),
    case(net(), (X, Y), **MSE, val=1.5, text="""
PlanError: a fraction for val lies between 0 and 1.
  where: val=1.5
  fix:   try val=0.2"""),
    case(net(), Endless(), **MSE, val=0.2, text="""
PlanError: a part of an iterable data set cannot be held back.
  where: val=0.2
  fix:   give the validation data themselves as val="""),
    case(net(), Endless(), **MSE, workers=2, text="""
PlanError: an iterable data set is read by one worker at most, not by 2.
  where: train
  fix:   use workers=1, or give a DataLoader over a data set that splits itself among its workers"""),
    case(net(), DataLoader(TensorDataset(X, Y)), **MSE, batch_size=8, text="""
PlanError: batch_size belongs to epochal's own loader, but train is a DataLoader.
  where: batch_size=8
  fix:   set batch_size where the DataLoader is made, or give its data set as train"""),
    case(net(), "nowhere.csv", **MSE, target="y", text="""
TableError: there is no file 'nowhere.csv'.
  where: train, nowhere.csv
  fix:   check the path"""),
    # targets and losses
    case(net(3), (X, C + 1), **CE, text="""
LossError: a target is outside the 3 classes that the model gives scores for.
  where: step 0, batch 0 of train; target 3 at position 2 of the data, outputs (32, 3)
  fix:   number the classes from 0 to 2: they seem to start at 1, give y - 1"""),
    case(net(2), DataLoader(TensorDataset(X, C), batch_size=8), **CE, text="""
LossError: a target is outside the 2 classes that the model gives scores for.
  where: step 0, batch 0 of train; target 2 at position 2 of the batch, outputs (8, 2)
  fix:   number the classes from 0 to 1, or give the model 3 outputs"""),
    case(net(3), (X, C - 1), **CE, text="""
LossError: a target is a negative class.
  where: train, target -1 at position 0
  fix:   number the classes from 0, or give the loss with ignore_index= set to this value"""),
    case(net(3), DataLoader(TensorDataset(X, C.int()), batch_size=8), **CE, text="""
LossError: class indices must be 64-bit integers.
  where: step 0, batch 0 of train; targets int32; loss nn.CrossEntropyLoss
  fix:   give y.long()"""),
    case(net(3), (X, C.float()), **CE, text="""
LossError: class indices must be integers.
  where: step 0, batch 0 of train; targets float32 (32,); loss nn.CrossEntropyLoss
  fix:   give the class of each sample as an integer, for example y.long()"""),
    case(net(3), (X, C[:, None]), **CE, text="""
LossShapeError: the class indices have one dimension too many.
  where: step 0, batch 0 of train; outputs (32, 3), targets (32, 1); loss nn.CrossEntropyLoss
  fix:   drop the dimension of size 1, for example y.squeeze(1)"""),
    case(net(), (X, C[:, None] % 2), loss="bce_with_logits", text="""
LossError: nn.BCEWithLogitsLoss needs floating point targets.
  where: step 0, batch 0 of train; targets int64
  fix:   give y.float()"""),
    case(net(), (X, Y[:, 0]), **MSE, text="""
LossShapeError: the loss is computed over tensors of different shapes.
  where: step 0, batch 0 of train; outputs (32, 1), targets (32,); loss nn.MSELoss
  fix:   give targets the shape (32, 1), for example y.unsqueeze(1)"""),
    case(net(2), (X, Y), **MSE, text="""
LossShapeError: the loss is computed over tensors of different shapes.
  where: step 0, batch 0 of train; outputs (32, 2), targets (32, 1); loss nn.MSELoss
  fix:   let the model give one output for each target"""),
    case(net(), (X, Y), loss=lambda outputs, targets: (outputs - targets) ** 2, text="""
LossError: the loss is not a scalar.
  where: step 0, batch 0 of train; loss <lambda>; its shape is (32, 1)
  fix:   return the mean, for example loss.mean()"""),
    case(net(), (X, Y), loss=lambda outputs, targets: 3.0, text="""
LossError: the loss is a float, not a tensor.
  where: step 0, batch 0 of train; loss <lambda>
  fix:   return the scalar tensor itself, not its .item()"""),
    case(net(), (X, Y), loss=lambda outputs, targets: (outputs.detach() - targets).mean(), text="""
FaultError: nothing leads back from the loss to a weight: it is cut off from the model.
  where: step 0, batch 0 of train; the loss, the plan at test_bad_input.py:LINE; of 4 trained parameters the loss reaches none
  fix:   return the tensor itself: without .item(), .detach(), .data, torch.tensor(...), argmax or NumPy on the way; if it is meant so: ignore=['detached-loss']"""),
    case(net(), (X, Y), loss=nn.MSELoss(reduction="sum"), text="""
LossError: the loss gives a sum and not the mean.
  where: loss=nn.MSELoss with reduction='sum'
  fix:   leave reduction at "mean"; with objective= you can return any scalar"""),
    case(net(), (X, Y), loss=nn.MSELoss, text="""
LossError: the loss is the class MSELoss, not an instance of it.
  where: loss=MSELoss
  fix:   give loss=MSELoss()"""),
    case(net(), X, **MSE, text="""
LossError: a loss compares outputs with targets, but a batch has no targets.
  where: step 0, batch 0 of train; a batch is float32 (32, 10)
  fix:   give (inputs, targets), name the dict entry with target="...", or use objective=f(model, batch)"""),
    case(net(), (X, Y), text="""
PlanError: there is nothing to minimise.
  where: loss=None, objective=None
  fix:   give loss="mse", loss="cross_entropy", a function f(outputs, targets), or objective=f(model, batch)"""),
    case(net(), (torch.where(X > 2, torch.nan, X), Y), **MSE, shuffle=False, text="""
NonFiniteError: the inputs hold a value that is not finite; the weights were not touched.
  where: step 0, epoch 1, batch 0; rows 4, 5, 6, 8, 27 of it; loss nan, gradient norm nan, lr 0.001
  fix:   mend or leave out these rows, or use nonfinite="skip\""""),
    # the model
    case(net(), ((X * 10).long(), Y), **MSE, text="""
ModelError: integer inputs reach a layer whose weights are float32.
  where: step 0, batch 0 of train; layer '0' (Linear); the batch is (int64 (32, 10), float32 (32, 1))
  fix:   give X.float() (and scale it), or let an nn.Embedding take the integers"""),
    case(net(), (X.double(), Y), **MSE, text="""
ModelError: a layer got numbers of another type than its weights: mat1 and mat2 must have the same dtype, but got Double and Float.
  where: step 0, batch 0 of train; layer '0' (Linear); the batch is (float64 (32, 10), float32 (32, 1))
  fix:   give X.to(torch.float32), or make the model double()"""),
    case(net(), (X[:, :7], Y), **MSE, text="""
ModelError: a layer cannot take inputs of this shape: mat1 and mat2 shapes cannot be multiplied (32x7 and 10x8).
  where: step 0, batch 0 of train; layer '0' (Linear); the batch is (float32 (32, 7), float32 (32, 1))
  fix:   make the layer's input size match the data"""),
    case(net(), (X, X, Y), **MSE, text="""
ModelError: the batch does not fit the model's forward: Sequential.forward() takes 2 positional arguments but 3 were given.
  where: step 0, batch 0 of train; layer 'model' (Sequential); the batch is (float32 (32, 10), float32 (32, 10), float32 (32, 1))
  fix:   (a, b, y) calls model(a, b), a dict calls model(**inputs); any other way: objective=f(model, batch)"""),
    case(net().requires_grad_(False), (X, Y), **MSE, text="""
ModelError: the model has no parameter to train.
  where: Sequential: all of its 97 parameters are frozen
  fix:   set requires_grad_(True) on the parameters that shall be trained"""),
    case(nn.Linear, (X, Y), **MSE, text="""
ModelError: the model is the class Linear, not an instance of it.
  where: model=Linear
  fix:   give Linear()"""),
    case(nn.LazyLinear(1), DataLoader(TensorDataset(X, Y)), **MSE, text="""
ModelError: the model has parameters without a shape.
  where: weight, bias of LazyLinear
  fix:   call the model once on a batch before fit, so that its lazy layers learn their sizes"""),
    # the options
    case(net(), (X, Y), **MSE, epoch=3, text="""
UnknownNameError: 'epoch' is not a known option.
  where: epoch=
  fix:   did you mean 'epochs'? known: accumulate, batch_size, clip, compile, device, early_stopping, epochs, evaluate_every, ignore, loss, lr, max_steps, max_time, metrics, model, monitor, nonfinite, objective, observers, optimizer, patience, precision, restore_best, resume, run, save, schedule, seed, shuffle, step, strategy, target, train, val, weight_decay, workers"""),
    case(net(), (X, Y), **MSE, metrics=["acuracy"], text="""
UnknownNameError: 'acuracy' is not a known metric.
  where: metrics
  fix:   did you mean 'accuracy'? known: accuracy, confusion, f1, mae, mse, precision, r2, recall, rmse, top5"""),
    case(net(), (X, Y), **MSE, val=0.2, monitor="val_los", text="""
UnknownNameError: 'val_los' is not a known column to monitor.
  where: monitor='val_los'
  fix:   did you mean 'val_loss'? known: train_loss, val_loss"""),
    case(net(), (X, Y), **MSE, optimizer="adm", text="""
UnknownNameError: 'adm' is not a known optimizer.
  where: optimizer='adm'
  fix:   did you mean 'adam'? known: adafactor, adagrad, adam, adamw, muon, nadam, radam, rmsprop, sgd"""),
    case(net(), (X, Y), loss="mze", text="""
UnknownNameError: 'mze' is not a known loss.
  where: loss='mze'
  fix:   did you mean 'mse'? known: bce, bce_with_logits, cross_entropy, huber, l1, mse, nll, smooth_l1"""),
    case(net(), (X, Y), **MSE, schedule="cosin", text="""
UnknownNameError: 'cosin' is not a known schedule.
  where: schedule='cosin'
  fix:   did you mean 'cosine'? known: cosine, exponential, linear, multistep, onecycle, plateau, step"""),
    case(net(), Endless(), **MSE, schedule="cosine", text="""
PlanError: the schedule 'cosine' needs to know how many steps there will be.
  where: the data have no length
  fix:   give max_steps="""),
    case(net(), (X, Y), **MSE, epochs=0, text="""
PlanError: epochs must be an integer of at least 1.
  where: epochs=0
  fix:   try epochs=10"""),
    case(net(), (X, Y), **MSE, lr=-1.0, text="""
PlanError: lr must be a number above 0.
  where: lr=-1.0
  fix:   try lr=0.001"""),
    case(net(), (X, Y), **MSE, lr=0.1, optimizer=torch.optim.SGD, text="""
PlanError: lr belongs to an optimizer that is given by name.
  where: lr=0.1, optimizer is a type
  fix:   set lr where the optimizer is made"""),
    case(net(), (X, Y), **MSE, optimizer=torch.optim.SGD(net().parameters(), lr=0.1), text="""
PlanError: the optimizer holds the parameters of another model.
  where: none of its 4 parameters is one of Sequential's
  fix:   build it over this model's parameters() (a copy of a model has new ones)"""),
    case(net(), (X, Y), **MSE, evaluate_every="often", text="""
PlanError: 'often' is not a number of epochs, steps or minutes.
  where: evaluate_every='often'
  fix:   give for example "1 epoch", "500 steps" or "10 min\""""),
    case(net(), (X, Y), **MSE, precision="fp8", text="""
UnknownNameError: 'fp8' is not a known precision.
  where: precision='fp8'
  fix:   did you mean 'fp32'? known: bf16, fp16, fp32"""),
    case(net(), (X, Y), **MSE, device="abacus", text="""
PlanError: the device 'abacus' cannot be used.
  where: device='abacus'; torch says: DEVICE
  fix:   use device="auto" or "cpu", or install a torch build for this device"""),
    case(net(), (X, Y), **MSE, patience=0, text="""
PlanError: patience must be an integer of at least 1.
  where: patience=0
  fix:   try 10"""),
    case(net(), (X, Y), **MSE, resume=True, text="""
PlanError: resume needs a run folder.
  where: resume=True, run=None
  fix:   give run="runs/x\""""),
    case(net(), (X, Y), **MSE, run="/proc/nowhere", text="""
RunFolderError: the run folder cannot be used: No such file or directory.
  where: /proc/nowhere
  fix:   choose a folder that can be written"""),
]  # fmt: skip


def weights_of(model):
    """The weights that have a shape; of a class there are none."""
    if isinstance(model, type):
        return {}
    return {name: value.clone() for name, value in model.state_dict().items() if type(value) is torch.Tensor}


@pytest.mark.parametrize(("model", "train", "options", "text"), CASES)
def test_the_error_in_full_and_nothing_has_moved(model, train, options, text):
    before = weights_of(model)
    with pytest.raises(epochal.EpochalError) as caught:
        epochal.fit(model, train, **{"epochs": 2, "observers": (), "seed": 0, **options})
    error = caught.value
    said = re.sub(r"test_bad_input.py:\d+", "test_bad_input.py:LINE", error.describe())
    if "torch says" in said:  # torch's own words are its own business
        said = said.replace(said.split("torch says: ")[1].splitlines()[0], "DEVICE")
    assert said == text
    after = weights_of(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_all_mistakes_are_told_at_once():
    with pytest.raises(epochal.EpochalError) as caught:
        epochal.fit(net(), (X, Y), loss="mze", optimizer="adm", epochs=0, lr=-1, epoch=3)
    assert (
        caught.value.describe().replace(str(caught.value.mistakes[0].fix), "...")
        == """\
PlanError: 5 options of the plan cannot be right.
- UnknownNameError: 'epoch' is not a known option.
    where: epoch=
    fix:   ...
- UnknownNameError: 'mze' is not a known loss.
    where: loss='mze'
    fix:   did you mean 'mse'? known: bce, bce_with_logits, cross_entropy, huber, l1, mse, nll, smooth_l1
- UnknownNameError: 'adm' is not a known optimizer.
    where: optimizer='adm'
    fix:   did you mean 'adam'? known: adafactor, adagrad, adam, adamw, muon, nadam, radam, rmsprop, sgd
- PlanError: lr must be a number above 0.
    where: lr=-1
    fix:   try lr=0.001
- PlanError: epochs must be an integer of at least 1.
    where: epochs=0
    fix:   try epochs=10"""
    )


def test_mistakes_of_data_and_model_are_told_at_once_too():
    with pytest.raises(epochal.EpochalError) as caught:
        epochal.fit(net().requires_grad_(False), (X, Y[:5]), loss="mse", epochs=1, monitor="val_loss")
    kinds = [type(mistake).__name__ for mistake in caught.value.mistakes]
    assert kinds == ["DataError", "ModelError", "UnknownNameError"]


def test_a_run_folder_is_never_overwritten(tmp_path):
    given = {"loss": "mse", "epochs": 1, "observers": (), "run": "runs/x"}
    epochal.fit(net(), (X, Y), **given)
    before = {path: path.read_bytes() for path in (tmp_path / "runs/x").rglob("*") if path.is_file()}
    with pytest.raises(epochal.EpochalError) as caught:
        epochal.fit(net(), (X, Y), **given)
    assert caught.value.describe() == (
        "RunFolderError: the run folder is not empty, and a run is never overwritten.\n"
        "  where: runs/x: checkpoints, config.toml, journal.jsonl, metrics.jsonl ...\n"
        "  fix:   choose another name for the run, or continue this one with resume=True (epochal resume runs/x, if a command began it)"
    )
    assert before == {path: path.read_bytes() for path in (tmp_path / "runs/x").rglob("*") if path.is_file()}


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
def test_an_unwritable_folder_is_known_before_training(tmp_path):
    model = net()
    before = model[0].weight.clone()
    epochal.fit(net(), (X, Y), loss="mse", epochs=1, observers=())  # everything is loaded
    (tmp_path / "locked").mkdir(mode=0o500)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)  # the superuser may write anywhere
        with pytest.raises(epochal.EpochalError) as caught:
            epochal.fit(model, (X, Y), loss="mse", epochs=1, observers=(), run=str(tmp_path / "locked" / "run"))
    finally:
        if root:
            os.seteuid(0)
    assert caught.value.describe() == (
        "RunFolderError: the run folder cannot be used: Permission denied.\n"
        f"  where: {tmp_path}/locked/run\n"
        "  fix:   choose a folder that can be written"
    )
    assert torch.equal(model[0].weight, before)


def test_an_error_of_the_users_own_stays_itself_and_says_where():
    def loss(outputs, targets):
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        epochal.fit(net(), (X, Y), loss=loss, epochs=1, observers=())
    note = "epochal: step 0, batch 0 of train; model Sequential; the batch is (float32 (32, 10), float32 (32, 1))"
    assert caught.value.__notes__ == [note]
    assert caught.value.__cause__ is None


def test_a_mistake_in_the_validation_data_names_it():
    with pytest.raises(epochal.EpochalError) as caught:
        epochal.fit(net(), (X, Y), val=(X[:, :5].clone(), Y.clone()), loss="mse", epochs=1, observers=())
    assert caught.value.where.startswith("batch 0 of val; layer '0' (Linear)")


def test_nothing_written_before_is_lost_when_training_fails(tmp_path):
    bad = X.clone()
    bad[40] = torch.nan
    calls = []

    def objective(model, batch):
        calls.append(1)
        x, y = batch
        return nn.functional.mse_loss(model(x if len(calls) > 6 else x.nan_to_num()), y)

    with pytest.raises(epochal.EpochalError, match="not finite"):
        epochal.fit(
            net(), (bad, Y), objective=objective, epochs=9, observers=(), run="runs/x", shuffle=False,
            save=epochal.Saving("1 epoch", share=None),
        )  # fmt: skip
    folder = tmp_path / "runs/x"
    rows = (folder / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + 3
    assert '"status": "ended"' in (folder / "run.json").read_text()
    assert '"reason": "nonfinite"' in (folder / "run.json").read_text()
    from epochal.checkpoint.weights import load_weights

    assert all(torch.isfinite(value).all() for value in load_weights(folder / "model.safetensors").values())
    assert len(list((folder / "checkpoints").iterdir())) == 3
