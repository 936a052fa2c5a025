"""Two networks with two optimizers: a generative adversarial network that writes digits.

Shows ``step=``: the maths of one update is yours, and all the rest stays. The step has a state (its optimizers),
so it is saved and resumed with the run. What it puts into ``values`` becomes columns of the table. The loss is
the energy distance between real and written images: unlike d_loss and g_loss it tells which weights are best.

    epochal train examples/gan.py
    epochal train examples/gan.py --hidden 32 --epochs 5
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import epochal
from epochal.errors import MissingPackageError

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as missing:
    raise MissingPackageError(
        f"{missing.name} is not installed.",
        where="examples/gan.py reads the digits of scikit-learn",
        fix="pip install --no-deps -r examples/requirements.txt",
    ) from missing


def plan(hidden: int = 256, noise: int = 16, epochs: int = 300, lr: float = 5e-4) -> epochal.Plan:
    """A generative adversarial network on handwritten digits.

    Args:
        hidden: units in each hidden layer.
        noise: how many random numbers the generator makes an image of.
    """
    images = torch.from_numpy(load_digits().data).float() / 8 - 1  # (1797, 64), from -1 to 1
    model = Adversaries(hidden, noise)
    return epochal.Plan(
        model, images, val=0.2, objective=distance_to_real, step=TakeTurns(model, lr), batch_size=64, epochs=epochs
    )


class Adversaries(nn.Module):
    """The generator turns noise (n, noise) into images (n, 64); the discriminator scores images as real, (n, 1)."""

    def __init__(self, hidden: int, noise: int):
        super().__init__()
        self.noise = noise
        self.generator = nn.Sequential(
            nn.Linear(noise, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, 64), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Linear(64, hidden), nn.LeakyReLU(0.2), nn.Dropout(0.3),
            nn.Linear(hidden, hidden), nn.LeakyReLU(0.2), nn.Dropout(0.3),
            nn.Linear(hidden, 1),
        )  # fmt: skip

    def forward(self, like: Tensor) -> Tensor:
        """As many new images as ``like`` has."""
        return self.generator(torch.randn(len(like), self.noise, device=like.device))


class TakeTurns:
    """One update: first the discriminator learns to tell apart, then the generator to pass."""

    def __init__(self, model: Adversaries, lr: float):
        parts = {"generator": model.generator, "discriminator": model.discriminator}
        self.optimizers = {
            name: torch.optim.Adam(part.parameters(), lr=lr, betas=(0.5, 0.999)) for name, part in parts.items()
        }
        self.parameters = {name: list(part.parameters()) for name, part in parts.items()}

    def __call__(self, state: epochal.TrainState, window: epochal.Window) -> epochal.StepResult:
        model, judge = state.model, state.model.discriminator
        real = torch.cat(window.batches).to(next(model.parameters()).device)
        written = model(real)
        d_loss = verdict(judge(real), 0.9) + verdict(judge(written.detach()), 0.0)
        self.move("discriminator", d_loss, window)
        g_loss = verdict(judge(written), 1.0)
        self.move("generator", g_loss, window)
        loss = energy_distance(real, written.detach())
        return epochal.StepResult(
            loss, sum(window.sizes), values={"d_loss": d_loss.detach(), "g_loss": g_loss.detach()}
        )

    def move(self, name: str, loss: Tensor, window: epochal.Window) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        loss.backward()
        epochal.average_gradients(self.parameters[name], window)  # for several processes; else it does nothing
        optimizer.step()

    def state_dict(self) -> dict:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


def verdict(scores: Tensor, real: float) -> Tensor:
    return binary_cross_entropy_with_logits(scores, torch.full_like(scores, real))


def distance_to_real(model: Adversaries, images: Tensor) -> Tensor:
    """What validation measures."""
    return energy_distance(images, model(images))


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """2 E|x - y| - E|x - x'| - E|y - y'|, without bias: 0 for samples of one distribution (Székely and Rizzo, 2013).

    x and y: (n, features) both.
    """
    pairs = len(x) * (len(x) - 1)
    return 2 * torch.cdist(x, y).mean() - (torch.cdist(x, x).sum() + torch.cdist(y, y).sum()) / pairs
