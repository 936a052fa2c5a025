"""``epochal demo``: a small network learns to read handwritten digits."""

from __future__ import annotations

from importlib.resources import files

from epochal.cli.options import Config, Device, Epochs, Processes, Restarts, Resume, Run, Seed
from epochal.runtime.launched import launches


def demo(
    *,
    epochs: Epochs = 15,
    run: Run = None,
    device: Device = "auto",
    seed: Seed = 0,
    processes: Processes = None,
    restarts: Restarts = None,
    config: Config = None,
    resume: Resume = False,
) -> None:
    """Train a small network on handwritten digits, in seconds.

    1,797 images of 8 × 8 pixels come with epochal; a fifth of them is held back for validation.
    """
    if launches(processes, restarts):
        return
    import numpy as np
    import torch
    from torch import nn

    import epochal
    from epochal.cli.training import train

    with files("epochal.cli").joinpath("digits.npz").open("rb") as file, np.load(file) as digits:
        images = torch.from_numpy(digits["images"])[:, None].float() / 16
        labels = torch.from_numpy(digits["labels"]).long()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    plan = epochal.Plan(
        model, (images, labels), val=0.2,
        loss="cross_entropy", optimizer="adamw", lr=0.003, schedule="cosine", epochs=epochs,
        metrics=["accuracy", "confusion"], device=device, seed=seed, run=run, resume=resume,
    )  # fmt: skip
    flags = {"epochs": epochs, "device": device, "seed": seed, "processes": processes, "restarts": restarts}
    train(plan, ["demo"], flags, {}, "epochal runs show {run}")
