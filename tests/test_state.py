"""The state is complete at every event: taken there, written, read into a new run, it gives the same bits."""

import copy
import json

import pytest
import torch
from torch import nn

import epochal
from epochal.checkpoint import codec


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        return ((outputs * self.scale - targets) ** 2).mean()


class SignDescent:
    """A step with a state of its own: it goes slower with every update."""

    def __init__(self):
        self.rate = 0.05

    def __call__(self, state, window):
        x, y = window.batches[0]
        loss = nn.functional.mse_loss(state.model(x), y)
        parameters = list(state.model.parameters())
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters)):
            p.data -= self.rate * g.sign()
        self.rate *= 0.9
        return epochal.StepResult(loss.detach(), weight=window.samples, values={"rate": torch.tensor(self.rate)})

    def state_dict(self):
        return {"rate": self.rate}

    def load_state_dict(self, state):
        self.rate = state["rate"]


VARIANTS = {
    "plain": dict,
    "plateau": lambda: {"schedule": epochal.Schedule("plateau", patience=0)},
    "cosine with warm-up": lambda: {"schedule": epochal.Schedule("cosine", warmup=3)},
    "onecycle": lambda: {"schedule": "onecycle"},
    "a step an epoch": lambda: {"schedule": epochal.Schedule("step", step_size=1)},
    "early stopping": lambda: {"early_stopping": epochal.EarlyStopping(patience=2, min_delta=100.0), "epochs": 5},
    "accumulation": lambda: {"accumulate": 2},
    "fp16": lambda: {"precision": "fp16"},
    "bf16 and clipping": lambda: {"precision": "bf16", "clip": 0.1},
    "metrics": lambda: {"metrics": ["mae", "r2"]},
    "a loss with a parameter": lambda: {"loss": Scaled()},
    "muon": lambda: {"optimizer": "muon"},
    "evaluations by steps": lambda: {"evaluate_every": "3 steps", "schedule": epochal.Schedule("plateau", patience=0)},
    "every second epoch": lambda: {"evaluate_every": "2 epochs"},
    "a step of one's own": lambda: {"step": SignDescent(), "lr": None},
    "no seed": lambda: {"seed": None},
}


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(count, 4, generator=generator)
    return X, X @ torch.randn(4, 1, generator=generator)


def told(rows):
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_event_can_be_resumed_from(variant):
    base = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))

    def plan(model):
        usual = {"loss": "mse", "epochs": 3, "lr": 0.1, "seed": 3, "batch_size": 10, "observers": ()}
        return epochal.Plan(model, data(43, 0), data(20, 1), **{**usual, **VARIANTS[variant]()})

    straight, states = copy.deepcopy(base), []
    with plan(straight).prepare() as run:
        for event in run:
            if not isinstance(event, epochal.Ended):
                states.append(codec.encode(copy.deepcopy(run.state.state_dict())))
    expected = run.result
    assert len(states) >= 10
    for tree, tensors in states:
        torch.manual_seed(len(tensors))  # a new process has other generators
        model = copy.deepcopy(base)
        with plan(model).prepare() as run:
            state = codec.decode(json.loads(json.dumps(tree)), {k: v.clone() for k, v in tensors.items()})
            run.state.load_state_dict(state)
            at = run.state.progress.step
            for _ in run:
                pass
        for name, value in straight.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), (at, name)
        assert told(run.result.history) == told(expected.history), at
        assert (run.result.reason, run.result.best) == (expected.reason, expected.best), at


def test_a_checkpoint_of_another_model_is_told(tmp_path):
    given = {"loss": "mse", "run": "r", "observers": ()}
    epochal.fit(nn.Linear(4, 1), data(20, 0), epochs=1, **given)
    with pytest.raises(epochal.EpochalError) as caught:
        epochal.fit(nn.Sequential(nn.Linear(4, 1)), data(20, 0), epochs=2, resume=True, **given)
    assert caught.value.describe() == (
        "CheckpointError: these weights belong to another model.\n"
        "  where: r/checkpoints/step-00000001; the model of the saved state; "
        "missing: 0.bias, 0.weight; unexpected: bias, weight\n"
        "  fix:   build the model as it was when they were saved"
    )
