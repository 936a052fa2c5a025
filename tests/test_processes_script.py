"""``fit`` in a script of the user's own, started by torchrun: the group may be theirs, and there is a life after it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed
SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
import epochal

ours = sys.argv[1] == "ours"
if ours:
    dist.init_process_group("gloo")

def train(seed, **given):
    torch.manual_seed(seed)
    X = torch.randn(150, 6, generator=torch.Generator().manual_seed(1))
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    result = epochal.fit(
        model, (X, X.sum(1, keepdim=True)), val=0.2, loss="mse", lr=0.01, batch_size=32, accumulate=2, seed=0, **given
    )
    return result, [row["train_loss"] for row in result.history]

first, losses = train(0, epochs=4, run="first")
second, _ = train(5, epochs=1, run="second")
_, resumed = train(0, epochs=6, run="first", resume=True)
rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
total = torch.ones(())
if size > 1:  # the program's own word to its other processes
    dist.all_reduce(total)
weights = torch.cat([p.detach().flatten() for p in second.model.parameters()]).tolist()
told = {"losses": losses, "resumed": resumed, "total": total.item(), "weights": weights}
with open(f"told-{size}-{rank}.json", "w") as file:
    json.dump(told, file)
if ours:
    dist.destroy_process_group()
"""


def run(*words):
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("group", ["ours", "none"])
def test_a_script_of_the_users_own_under_torchrun(group):
    Path("script.py").write_text(SCRIPT)
    run("script.py", "alone")
    alone = json.loads(Path("told-1-0.json").read_text())
    for folder in "first", "second":
        Path(folder).rename(f"alone-{folder}")
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py", group)
    both = [json.loads(Path(f"told-2-{rank}.json").read_text()) for rank in range(2)]
    assert [one["total"] for one in both] == [2.0, 2.0]
    assert both[0]["losses"] == both[1]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert both[0]["resumed"] == pytest.approx(alone["resumed"], rel=1e-5) and len(alone["resumed"]) == 6
    assert both[0]["weights"] == both[1]["weights"] == pytest.approx(alone["weights"], rel=1e-4, abs=1e-6)
    assert done.stderr.count("epoch 1/4") == done.stderr.count("epoch 1/1") == 1  # the first process alone prints
    assert "Traceback" not in done.stderr


RECIPE = """
import torch
import epochal

def plan() -> epochal.Plan:
    X = torch.linspace(-1, 1, 60).reshape(20, 3)
    return epochal.Plan(torch.nn.Linear(3, 1), (X, X[:, :1]), loss="mse", epochs=2, seed=0)
"""


def test_a_recipe_under_torchrun_in_a_folder_that_is_named():
    Path("recipe.py").write_text(RECIPE)
    torchrun = Path(sys.executable).with_name("torchrun")
    words = ["-m", "epochal", "train", "recipe.py", "--run", "runs/x"]
    done = run(str(torchrun), "--standalone", "--nproc-per-node=2", "--", *words)
    assert Path("runs/x/model.safetensors").exists() and "epochal runs show runs/x" in done.stdout
    assert done.stderr.count("epoch 1/2") == 1
