"""Healthy programs whose losses, targets or updates look wrong to a naive rule, and are right."""

# ruff: noqa: C408

from __future__ import annotations

import math

import torch
from benchmarks.faults.material import binary, blobs, diabetes, digits, generator, line, mlp, text
from benchmarks.faults.program import healthy
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Sampler, TensorDataset

import epochal


def dice(model: nn.Module) -> torch.Generator | None:
    """What is drawn with: anew in training, always the same in validation."""
    return None if model.training else generator(7)


class Adversaries(nn.Module):
    def __init__(self, noise: int, hidden: int, width: int = 2):
        super().__init__()
        self.noise = noise
        self.writer = nn.Sequential(
            nn.Linear(noise, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
        )
        self.judge = nn.Sequential(
            nn.Linear(width, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2),
            nn.Linear(hidden, 1),
        )  # fmt: skip

    def forward(self, like: Tensor) -> Tensor:
        return self.writer(torch.randn(len(like), self.noise))


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    pairs = len(x) * (len(x) - 1)
    return 2 * torch.cdist(x, y).mean() - (torch.cdist(x, x).sum() + torch.cdist(y, y).sum()) / pairs


def ring(count: int = 1024) -> Tensor:
    draw = generator(3)
    angle = 2 * math.pi * torch.rand(count, generator=draw)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2, generator=draw)


@healthy
def gan_that_writes_a_ring():
    """Two networks play against each other: their losses stay near ln 2, and what they write comes near the data."""
    torch.manual_seed(0)
    model = Adversaries(4, 64)
    judging = torch.optim.Adam(model.judge.parameters(), lr=3e-3, betas=(0.5, 0.999))
    writing = torch.optim.Adam(model.writer.parameters(), lr=1e-3, betas=(0.5, 0.999))

    def verdict(points: Tensor, real: float) -> Tensor:
        scores = model.judge(points)
        return functional.binary_cross_entropy_with_logits(scores, torch.full_like(scores, real))

    def take_turns(state, window):
        real = window.batches[0]
        written = model(real)
        judged = verdict(real, 1.0) + verdict(written.detach(), 0.0)
        judging.zero_grad()
        judged.backward()
        judging.step()
        fooled = verdict(written, 1.0)
        writing.zero_grad()
        fooled.backward()
        writing.step()
        values = {"judged": judged.detach(), "fooled": fooled.detach()}
        return epochal.StepResult(energy_distance(real, written.detach()), window.samples, values=values)

    return dict(model=model, train=ring(), step=take_turns, batch_size=64, epochs=30)


@healthy
def wasserstein_critic_with_a_gradient_penalty():
    """The critic's loss is negative, its last bias cancels out, and its gradient is differentiated once more."""
    torch.manual_seed(1)
    model = Adversaries(4, 48)
    judging = torch.optim.Adam(model.judge.parameters(), lr=2e-3, betas=(0.0, 0.9))
    writing = torch.optim.Adam(model.writer.parameters(), lr=1e-3, betas=(0.0, 0.9))

    def critic_loss(real: Tensor, written: Tensor) -> Tensor:
        mix = torch.rand(len(real), 1)
        between = (mix * real + (1 - mix) * written).requires_grad_()
        (slope,) = torch.autograd.grad(model.judge(between).sum(), between, create_graph=True)
        penalty = ((slope.norm(dim=1) - 1) ** 2).mean()
        return model.judge(written).mean() - model.judge(real).mean() + penalty

    def update(state, window):
        real = window.batches[0]
        for _ in range(2):
            judged = critic_loss(real, model(real).detach())
            judging.zero_grad()
            judged.backward()
            judging.step()
        written = model(real)
        writing.zero_grad()
        (-model.judge(written).mean()).backward()
        writing.step()
        return epochal.StepResult(
            energy_distance(real, written.detach()), window.samples, values={"critic": judged.detach()}
        )

    return dict(model=model, train=ring(), step=update, batch_size=64, epochs=20)


class VariationalAutoencoder(nn.Module):
    def __init__(self, codes: int = 8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2 * codes))
        self.decoder = nn.Sequential(nn.Linear(codes, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        code = mean
        if self.training:
            code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(code), mean, log_variance


@healthy
def variational_autoencoder():
    """The loss is a sum over pixels and a KL term over codes, about 45 at the start, and never comes near zero."""
    torch.manual_seed(0)

    def negative_elbo(model, x):
        logits, mean, log_variance = model(x)
        pixels = functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)
        divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1)
        return (pixels + divergence).mean()

    x, _ = digits()
    return dict(model=VariationalAutoencoder(), train=x, val=0.2, objective=negative_elbo, lr=3e-3, epochs=15)


@healthy
def contrastive_views_of_digits():
    """Each row of the loss looks at all other rows of the batch, as contrastive learning does, and has no target."""
    torch.manual_seed(0)
    x, _ = digits()
    x = (x - 0.305) / 0.376

    def view(x: Tensor, draw: torch.Generator | None) -> Tensor:
        kept = torch.rand(x.shape, generator=draw) < 0.8
        return x * kept + 0.1 * torch.randn(x.shape, generator=draw)

    def nt_xent(model, x):
        draw = dice(model)
        both = torch.cat([view(x, draw), view(x, draw)])
        z = functional.normalize(model(both), dim=1)
        likeness = (z @ z.T / 0.2).masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
        partner = torch.arange(len(z)).roll(len(x))
        return functional.cross_entropy(likeness, partner)

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    return dict(model=model, train=x[:960], val=0.2, objective=nt_xent, lr=1e-3, batch_size=64, epochs=15)


class TwoViews(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))
        self.predictor = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        return self.predictor(z), z


@healthy
def siamese_views_with_a_stopped_gradient():
    """The loss is a negative cosine, and one of its two sides is detached on purpose."""
    torch.manual_seed(0)
    x, _ = digits()
    x = (x - 0.305) / 0.376

    def negative_cosine(model, x):
        draw = dice(model)
        left, right = (x + 0.5 * torch.randn(x.shape, generator=draw) for _ in range(2))
        (p, z), (q, w) = model(left), model(right)
        alike = functional.cosine_similarity(p, w.detach()).mean() + functional.cosine_similarity(q, z.detach()).mean()
        return -alike / 2

    def momentum(parameters):
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4)

    return dict(
        model=TwoViews(), train=x[:960], val=0.2, objective=negative_cosine, optimizer=momentum, batch_size=64,
        epochs=10,
    )  # fmt: skip


@healthy
def triplets_beyond_the_margin():
    """Most triplets come to lie beyond the margin: their loss and gradient are exactly zero, as they should be."""
    x, y = blobs(count=800, classes=6, features=10, seed=2)
    margin = nn.TripletMarginLoss(margin=1.0)

    def triplets(x: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        draw = generator(5)
        anchors = torch.randint(len(x), (count,), generator=draw)
        same, other = y[anchors][:, None] == y, y[anchors][:, None] != y
        positives = torch.multinomial(same.float(), 1, generator=draw).flatten()
        negatives = torch.multinomial(other.float(), 1, generator=draw).flatten()
        return x[anchors], x[positives], x[negatives]

    def apart(model, batch):
        anchor, positive, negative = batch
        return margin(model(anchor), model(positive), model(negative))

    return dict(
        model=mlp(10, 8, seed=2), train=triplets(x[:640], y[:640], 1200), val=triplets(x[640:], y[640:], 240),
        objective=apart, lr=3e-3, epochs=6,
    )  # fmt: skip


@healthy
def mixed_pairs_with_soft_labels():
    """Mixup: inputs and labels of two samples are blended in training, so the training loss stays above that of val."""
    torch.manual_seed(0)
    x, y = digits()

    def mixed(model, batch):
        x, y = batch
        if not model.training:
            scores = model(x)
            return epochal.Loss(functional.cross_entropy(scores, y), outputs=scores, targets=y)
        share, partner = torch.distributions.Beta(0.4, 0.4).sample(), torch.randperm(len(x))
        hot = functional.one_hot(y, 10).float()
        scores = model(share * x + (1 - share) * x[partner])
        soft = share * hot + (1 - share) * hot[partner]
        return epochal.Loss(functional.cross_entropy(scores, soft), outputs=scores, targets=y)

    return dict(
        model=mlp(64, 10, hidden=64), train=(x, y), val=0.2, objective=mixed, lr=3e-3, metrics=["accuracy"], epochs=10
    )


@healthy
def smoothed_labels():
    """With label smoothing the loss cannot fall below 0.5, although nearly all classes are right."""
    return dict(
        model=mlp(64, 10, hidden=64), train=digits(), val=0.2, loss=nn.CrossEntropyLoss(label_smoothing=0.1), lr=3e-3,
        metrics=["accuracy"], epochs=10,
    )  # fmt: skip


@healthy
def rare_class_with_weights():
    """One sample in twenty is of class 1, and the loss weighs it nineteen times: the imbalance is dealt with."""
    draw = generator(0)
    y = (torch.rand(1000, generator=draw) < 0.05).long()
    x = torch.randn(1000, 6, generator=draw) + 1.2 * y[:, None]
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 19.0]))
    return dict(
        model=mlp(6, 2, hidden=16), train=(x, y), val=0.3, loss=loss, lr=1e-3, metrics=["recall"], epochs=10, seed=0
    )


@healthy
def counts_with_a_poisson_loss():
    """The Poisson loss without its constant is far below zero, and the targets are counts up to some hundreds."""
    draw = generator(0)
    x = torch.randn(800, 5, generator=draw)
    rate = (3 + x @ torch.tensor([[0.6], [-0.4], [0.3], [0.0], [0.2]])).exp()
    y = torch.poisson(rate, generator=draw)
    return dict(model=mlp(5, 1), train=(x, y), val=0.2, loss=nn.PoissonNLLLoss(), lr=5e-3, epochs=12)


class MeanAndVariance(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 32), nn.Tanh())
        self.mean, self.spread = nn.Linear(32, 1), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.mean(h), functional.softplus(self.spread(h)) + 1e-4


@healthy
def gaussian_likelihood_below_zero():
    """The negative log-likelihood of a narrow Gaussian is below zero: a density may be above one."""
    torch.manual_seed(0)

    def likelihood(outputs, targets):
        mean, variance = outputs
        return functional.gaussian_nll_loss(mean, targets, variance)

    return dict(model=MeanAndVariance(4), train=line(noise=0.1), val=0.2, loss=likelihood, lr=5e-3, epochs=20)


@healthy
def scores_matched_without_targets():
    """Score matching: no targets at all, a second derivative in the loss, and values below zero."""
    torch.manual_seed(0)
    draw = generator(2)
    centres = torch.tensor([[1.5, 0.0], [-1.5, 0.0], [0.0, 1.5]])
    x = centres[torch.randint(3, (768,), generator=draw)] + 0.4 * torch.randn(768, 2, generator=draw)
    model = nn.Sequential(
        nn.Linear(2, 48), nn.Softplus(), nn.Linear(48, 48), nn.Softplus(), nn.Linear(48, 1, bias=False)
    )

    def matching(energy, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        score = -slope
        curvature = sum(torch.autograd.grad(score[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2))
        return (curvature + 0.5 * (score**2).sum(1)).mean()

    return dict(model=model, train=x, objective=matching, lr=5e-3, batch_size=64, epochs=20)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, when: Tensor) -> Tensor:
        waves = torch.cat([f(when * scale) for scale in (1.0, 4.0) for f in (torch.sin, torch.cos)], 1)
        return self.body(torch.cat([x, waves], 1))


@healthy
def diffusion_denoiser():
    """Noise cannot be told from the data where there is little of it, so the loss ends well above zero and jumps."""
    torch.manual_seed(0)

    def denoise(model, x):
        draw = dice(model)
        when = torch.rand(len(x), 1, generator=draw)
        noise = torch.randn(x.shape, generator=draw)
        kept = (when * math.pi / 2).cos()
        return functional.mse_loss(model(kept * x + (1 - kept**2).sqrt() * noise, when), noise)

    return dict(model=Denoiser(), train=ring() * 1.4, val=0.2, objective=denoise, lr=3e-3, epochs=25)


class Reader(nn.Module):
    """Words (n, t) to scores (n, words, t), from both sides."""

    def __init__(self, words: int, outputs: int, width: int = 32):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.reader = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.scores = nn.Linear(2 * width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scores(self.reader(self.words(tokens))[0]).transpose(1, 2)


@healthy
def masked_words_with_most_targets_ignored():
    """Only the hidden 15 % of the words are guessed; all other targets are -100, as in BERT."""
    torch.manual_seed(0)
    tokens, _ = text(count=800)
    hidden = torch.rand(tokens.shape, generator=generator(1)) < 0.15
    x, y = tokens.masked_fill(hidden, 20), tokens.masked_fill(~hidden, -100)
    return dict(
        model=Reader(21, 20), train=(x, y), val=0.2, loss="cross_entropy", lr=1e-2, metrics=["accuracy"], epochs=5
    )


@healthy
def segmentation_with_an_unlabelled_border():
    """The pixels on the border of an object have the label 255, which the loss ignores."""
    torch.manual_seed(0)
    draw = generator(4)
    x, y = 0.7 * torch.randn(300, 1, 16, 16, generator=draw), torch.zeros(300, 16, 16, dtype=torch.long)
    for image, labels, (top, left) in zip(x, y, torch.randint(8, (300, 2), generator=draw).tolist()):
        labels[top : top + 8, left : left + 8] = 255
        labels[top + 1 : top + 7, left + 1 : left + 7] = 1
        image[0, top + 1 : top + 7, left + 1 : left + 7] += 1.5
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 2, 1)
    )
    loss = nn.CrossEntropyLoss(ignore_index=255)
    return dict(model=model, train=(x, y), val=0.2, loss=loss, lr=5e-3, batch_size=16, epochs=6)


@healthy
def ranked_pairs():
    """A batch holds the better and the worse of each pair and no targets; only differences of scores are learned."""
    torch.manual_seed(0)
    draw = generator(6)
    a, b = torch.randn(2, 800, 6, generator=draw)

    def worth(x: Tensor) -> Tensor:
        return x[:, 0] * x[:, 1] + x[:, 2]

    swapped = (worth(a) < worth(b))[:, None]
    better, worse = torch.where(swapped, b, a), torch.where(swapped, a, b)
    model = nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 1, bias=False))

    def preference(model, batch):
        better, worse = batch
        return functional.softplus(model(worse) - model(better)).mean()

    return dict(model=model, train=(better, worse), val=0.2, objective=preference, lr=3e-3, epochs=12)


class Hearing(nn.Module):
    def __init__(self, inputs: int, symbols: int):
        super().__init__()
        self.reader = nn.GRU(inputs, 32, batch_first=True, bidirectional=True)
        self.scores = nn.Linear(64, symbols + 1)

    def forward(self, frames: Tensor) -> Tensor:
        return functional.log_softmax(self.scores(self.reader(frames)[0]), 2)


@healthy
def symbols_heard_with_ctc():
    """CTC: frames and symbols have different lengths, and at first the blank wins everywhere."""
    torch.manual_seed(0)
    draw = generator(8)
    sounds = torch.randn(5, 8, generator=draw)
    symbols = torch.randint(5, (480, 4), generator=draw)
    frames = sounds[symbols.repeat_interleave(4, 1)] + 0.3 * torch.randn(480, 16, 8, generator=draw)
    frames[:, ::4] = 0.3 * torch.randn(480, 4, 8, generator=draw)  # a pause before each

    def ctc(model, batch):
        frames, symbols = batch
        chances = model(frames).transpose(0, 1)
        heard, said = (torch.full((len(frames),), n) for n in (16, 4))
        return functional.ctc_loss(chances, symbols + 1, heard, said)

    return dict(model=Hearing(8, 5), train=(frames, symbols), val=0.2, objective=ctc, lr=1e-2, clip=5.0, epochs=8)


@healthy
def policy_gradient_on_a_bandit():
    """REINFORCE: the training loss hovers around zero and tells nothing, while the chosen arms get better."""
    torch.manual_seed(0)
    draw = generator(9)
    x = torch.randn(1000, 6, generator=draw)
    worth = x @ torch.randn(6, 4, generator=draw)
    rewards = (worth == worth.amax(1, keepdim=True)).float()

    def reinforce(model, batch):
        x, rewards = batch
        scores = model(x)
        chances = scores.softmax(1)
        if not model.training:
            return epochal.Loss(-(chances * rewards).sum(1).mean(), outputs=scores, targets=rewards.argmax(1))
        arms = torch.multinomial(chances.detach(), 1)
        gained = rewards.gather(1, arms)
        value = -(scores.log_softmax(1).gather(1, arms) * (gained - gained.mean())).mean()
        return epochal.Loss(value, outputs=scores, targets=rewards.argmax(1))

    return dict(
        model=mlp(6, 4), train=(x, rewards), val=0.2, objective=reinforce, lr=5e-3, metrics=["accuracy"], batch_size=64,
        epochs=20,
    )  # fmt: skip


class Agent(nn.Module):
    def __init__(self, states: int, actions: int):
        super().__init__()
        self.values = nn.Sequential(nn.Linear(states, 32), nn.ReLU(), nn.Linear(32, actions))
        self.slow = nn.Sequential(nn.Linear(states, 32), nn.ReLU(), nn.Linear(32, actions)).requires_grad_(False)
        self.slow.load_state_dict(self.values.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.values(x)


@healthy
def values_learned_with_a_slow_target():
    """Q-learning: half of the parameters are a slow copy that no optimizer holds, and the loss first rises."""
    torch.manual_seed(0)
    draw, states = generator(10), 8
    here = torch.randint(states - 1, (1600,), generator=draw)
    action = torch.randint(2, (1600,), generator=draw)
    there = (here + 2 * action - 1).clamp(0, states - 1)
    reward = (there == states - 1).float()
    seen = functional.one_hot(here, states).float()
    next_seen = functional.one_hot(there, states).float()
    model = Agent(states, 2)

    def learn(state, window):
        seen, action, next_seen, reward = window.batches[0]
        agent = state.model
        with torch.no_grad():
            wanted = reward + 0.9 * (1 - reward) * agent.slow(next_seen).amax(1)
        loss = functional.smooth_l1_loss(agent(seen).gather(1, action[:, None])[:, 0], wanted)
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        for slow, fast in zip(agent.slow.parameters(), agent.values.parameters()):
            slow.lerp_(fast.detach(), 0.05)
        return epochal.StepResult(loss.detach(), window.samples)

    return dict(
        model=model, train=(seen, action, next_seen, reward), step=learn,
        optimizer=torch.optim.Adam(model.values.parameters(), lr=3e-3), epochs=20,
    )  # fmt: skip


@healthy
def sharpness_aware_steps():
    """SAM: each update moves the weights uphill, takes a second gradient there, moves back and steps."""
    x, y = digits()
    model = mlp(64, 10, hidden=48, seed=4)

    def sharpness_aware(state, window):
        x, y = window.batches[0]
        weights = list(state.model.parameters())
        scores = state.model(x)
        loss = functional.cross_entropy(scores, y)
        first = torch.autograd.grad(loss, weights)
        length = torch.stack([g.norm() for g in first]).norm() + 1e-12
        with torch.no_grad():
            for weight, gradient in zip(weights, first):
                weight.add_(gradient, alpha=0.05 / float(length))
        state.optimizer.zero_grad()
        functional.cross_entropy(state.model(x), y).backward()
        with torch.no_grad():
            for weight, gradient in zip(weights, first):
                weight.sub_(gradient, alpha=0.05 / float(length))
        state.optimizer.step()
        return epochal.StepResult(loss.detach(), window.samples, seen=[(scores.detach(), y)])

    return dict(
        model=model, train=(x, y), val=0.2, loss="cross_entropy", step=sharpness_aware,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), metrics=["accuracy"], epochs=8,
    )  # fmt: skip


class ByClass(Sampler):
    """Batches of one class each, all classes in turn."""

    def __init__(self, y: Tensor, size: int):
        self.rows = [torch.nonzero(y == label).flatten() for label in y.unique()]
        self.size, self.rounds = size, min(map(len, self.rows)) // size
        self.draw = generator(11)

    def __iter__(self):
        rows = [own[torch.randperm(len(own), generator=self.draw)] for own in self.rows]
        for start in range(0, self.rounds * self.size, self.size):
            for own in rows:
                yield own[start : start + self.size].tolist()

    def __len__(self) -> int:
        return self.rounds * len(self.rows)


@healthy
def single_class_batches_in_one_update():
    """Every micro-batch is of one class, but ten of them, one of each class, make one update."""
    x, y = digits()
    train = DataLoader(TensorDataset(x[:800], y[:800]), batch_sampler=ByClass(y[:800], 6))
    return dict(
        model=mlp(64, 10, hidden=64, seed=1), train=train, val=(x[800:], y[800:]), loss="cross_entropy", lr=5e-3,
        accumulate=10, metrics=["accuracy"], epochs=12,
    )  # fmt: skip


@healthy
def autoencoder_with_a_sigmoid_and_mse():
    """A sigmoid ends the model and the loss is the squared error: the pixels are in 0..1, so all can be reached."""
    torch.manual_seed(0)
    x, _ = digits()
    model = nn.Sequential(
        nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 12), nn.ReLU(), nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 64),
        nn.Sigmoid(),
    )  # fmt: skip
    return dict(model=model, train=(x, x), val=0.2, loss="mse", lr=3e-3, epochs=15)


@healthy
def tanh_for_targets_in_its_range():
    """A tanh ends a regression: the targets are steering angles within -1..1."""
    torch.manual_seed(0)
    x, y = line(features=6, seed=3)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1), nn.Tanh())
    return dict(model=model, train=(x, 0.9 * torch.sin(1.5 * y)), val=0.2, loss=nn.SmoothL1Loss(), lr=5e-3, epochs=12)


@healthy
def log_softmax_with_nll():
    """The model ends with log_softmax, all outputs are below zero, and the loss is the NLL that wants just this."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10), nn.LogSoftmax(dim=1))
    return dict(model=model, train=digits(), val=0.2, loss=nn.NLLLoss(), lr=5e-3, metrics=["accuracy"], epochs=8)


@healthy
def probabilities_with_a_loss_of_probabilities():
    """The model ends with a softmax, and the loss takes the logarithm of its probabilities, and no softmax again."""
    torch.manual_seed(0)

    def log_loss(chances, y):
        return functional.nll_loss(chances.clamp_min(1e-7).log(), y)

    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3), nn.Softmax(dim=1))
    return dict(model=model, train=blobs(), val=0.2, loss=log_loss, lr=5e-3, metrics=["accuracy"], epochs=10)


@healthy
def soft_targets_between_zero_and_one():
    """The targets are shares of votes: the binary cross-entropy has a floor of 0.5, and starts near ln 2."""
    x, y = line(features=6, noise=0.0, seed=1)
    shares = torch.sigmoid(1.5 * y)
    return dict(model=mlp(6, 1, seed=1), train=(x, shares), val=0.2, loss="bce_with_logits", lr=3e-3, epochs=10)


@healthy
def focal_loss_on_rare_positives():
    """Focal loss starts at 0.05 and becomes tiny, for what is easy hardly counts."""
    draw = generator(12)
    y = (torch.rand(1000, 1, generator=draw) < 0.1).float()
    x = torch.randn(1000, 6, generator=draw)
    x = torch.where(y > 0, x + 1.3, x)

    def focal(logits, y):
        plain = functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
        share = torch.where(y > 0, 0.75, 0.25)
        return (share * (1 - (-plain).exp()) ** 2 * plain).mean()

    return dict(model=mlp(6, 1, hidden=24), train=(x, y), val=0.3, loss=focal, lr=3e-3, epochs=12, seed=0)


@healthy
def hinge_loss_with_signs():
    """A support vector machine: no non-linearity, targets of -1 and +1, no gradient from beyond the margin."""
    torch.manual_seed(0)
    x, y = binary(seed=3)

    def hinge(scores, signs):
        return functional.relu(1 - signs * scores).mean()

    return dict(
        model=nn.Linear(8, 1), train=(x, 2 * y - 1), val=0.2, loss=hinge, optimizer="sgd", lr=0.05, weight_decay=1e-3,
        epochs=10,
    )  # fmt: skip


class Ordered(nn.Module):
    """One score, and the thresholds between the grades."""

    def __init__(self, inputs: int, grades: int):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, 1, bias=False))
        self.thresholds = nn.Parameter(torch.linspace(-1.5, 1.5, grades - 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x) - self.thresholds


@healthy
def grades_with_cumulative_targets():
    """Ordinal regression: the target of a grade is a row of ones and then zeros, and one score serves all columns."""
    torch.manual_seed(0)
    x, y = diabetes()
    edges = torch.tensor([-0.9, -0.3, 0.3, 0.9])
    return dict(
        model=Ordered(10, 5), train=(x, (y > edges).float()), val=0.2, loss="bce_with_logits", lr=5e-3, epochs=12
    )


@healthy
def squared_error_summed_over_pixels():
    """The error is summed over the pixels of an image and averaged over images, so the loss is some tens at first."""
    torch.manual_seed(0)
    x, _ = digits()
    x = (x - 0.305) / 0.376

    def per_image(outputs, targets):
        return ((outputs - targets) ** 2).sum(1).mean()

    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 64))
    return dict(model=model, train=(x, x), val=0.2, loss=per_image, lr=3e-3, epochs=12)


@healthy
def tags_of_which_many_hold():
    """Multi-label: rows of targets sum to anything from 0 to 6, and each tag has a logit of its own."""
    draw = generator(13)
    x = torch.randn(800, 10, generator=draw)
    tags = (x @ torch.randn(10, 6, generator=draw) + 0.5 * torch.randn(800, 6, generator=draw) > 1).float()
    return dict(
        model=mlp(10, 6, seed=5), train=(x, tags), val=0.2, loss=nn.BCEWithLogitsLoss(), lr=3e-3, metrics=["accuracy"],
        epochs=10,
    )  # fmt: skip


class Priced(nn.Module):
    """Prices: the body works in units of their deviation."""

    def __init__(self, inputs: int, mean: float, deviation: float):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 1))
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("deviation", torch.tensor(deviation))

    def forward(self, x: Tensor) -> Tensor:
        return self.mean + self.deviation * self.body(x)


@healthy
def prices_scaled_within_the_model():
    """The targets are some hundred thousands and the loss some billions; the model itself scales what it gives."""
    torch.manual_seed(0)
    x, y = line(features=6, seed=4)
    prices = 300_000 + 80_000 * y
    model = Priced(6, 300_000.0, 80_000.0)
    return dict(model=model, train=(x, prices), val=0.2, loss="mse", lr=3e-3, metrics=["r2"], epochs=12)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.digit, self.ink = nn.Linear(64, 10), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        return {"digit": self.digit(h), "ink": self.ink(h)}


@healthy
def two_tasks_and_dicts():
    """The model returns a dict, and two losses of different kinds are added with a weight."""
    torch.manual_seed(0)
    x, y = digits()
    ink = x.mean(1, keepdim=True)
    data = {"x": x, "digit": y, "ink": (ink - ink.mean()) / ink.std()}

    def both(outputs, targets):
        first = functional.cross_entropy(outputs["digit"], targets["digit"])
        return first + 0.5 * functional.mse_loss(outputs["ink"], targets["ink"])

    return dict(
        model=TwoHeads(), train=data, target=["digit", "ink"], val=0.2, loss=both, optimizer="adamw", lr=3e-3, epochs=8
    )


class SparseAutoencoder(nn.Module):
    def __init__(self, inputs: int, codes: int):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(inputs, codes), nn.Linear(codes, inputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = functional.relu(self.encoder(x))
        return self.decoder(code), code


@healthy
def sparse_codes():
    """An L1 penalty makes most of the codes zero for most samples, which is what it is for."""
    torch.manual_seed(0)
    x, _ = digits()

    def sparse(outputs, targets):
        back, code = outputs
        return ((back - targets) ** 2).sum(1).mean() + 0.06 * code.sum(1).mean()

    return dict(model=SparseAutoencoder(64, 96), train=(x, x), val=0.2, loss=sparse, lr=1e-3, epochs=20)


@healthy
def three_quantiles_of_one_target():
    """Outputs (n, 3) meet targets (n, 1) in the pinball loss, and are broadcast on purpose: a column a quantile."""
    torch.manual_seed(0)
    x, y = line(features=5, noise=0.5, seed=6)
    levels = torch.tensor([0.1, 0.5, 0.9])

    def pinball(outputs, targets):
        over = targets - outputs
        return torch.maximum(levels * over, (levels - 1) * over).mean()

    return dict(model=mlp(5, 3, seed=6), train=(x, y), val=0.2, loss=pinball, lr=3e-3, epochs=12)


@healthy
def survival_with_a_partial_likelihood():
    """Cox's likelihood compares each patient with all of the batch who lived as long; it stays far above zero."""
    torch.manual_seed(0)
    draw = generator(14)
    x = torch.randn(768, 5, generator=draw)
    hazard = (x @ torch.tensor([1.0, -1.0, 0.5, 0.0, 0.0])).exp()
    lived = -torch.rand(768, generator=draw).clamp_min(1e-6).log() / hazard
    died = (torch.rand(768, generator=draw) < 0.8).float()

    def partial(risk, targets):
        lived, died = targets.unbind(1)
        at_risk = lived >= lived[:, None]  # whom each row is compared with
        pool = risk.T.expand(len(risk), -1).masked_fill(~at_risk, -math.inf).logsumexp(1)
        return (died * (pool - risk[:, 0])).sum() / died.sum().clamp_min(1)

    model = nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 1, bias=False))
    data = (x, torch.stack([lived, died], 1))
    return dict(model=model, train=data, loss=partial, lr=5e-3, batch_size=64, epochs=12)


@healthy
def likelihood_of_a_flow():
    """A normalising flow: the last layer of each coupling starts at zero, so that the flow changes nothing at first."""
    torch.manual_seed(0)
    draw = generator(15)
    angle = math.pi * torch.rand(1000, 1, generator=draw)
    x = torch.cat([angle.cos(), angle.sin()], 1) + 0.03 * torch.randn(1000, 2, generator=draw)
    return dict(
        model=Flow(), train=(x - x.mean(0)) / x.std(0), val=0.2, objective=lambda flow, x: flow(x).mean(), lr=5e-3,
        batch_size=64, epochs=25,
    )  # fmt: skip


class Flow(nn.Module):
    """Points (n, 2) to their negative log-likelihood, (n,)."""

    def __init__(self, layers: int = 6):
        super().__init__()
        self.couplings = nn.ModuleList(
            nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
            for _ in range(layers)
        )
        for coupling in self.couplings:
            nn.init.zeros_(coupling[-1].weight)
            nn.init.zeros_(coupling[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        volume = x.new_zeros(len(x))
        for coupling in self.couplings:
            kept, moved = x.chunk(2, 1)
            stretch, shift = coupling(kept).chunk(2, 1)
            stretch = 2 * torch.tanh(stretch)
            x = torch.cat([moved * stretch.exp() + shift, kept], 1)
            volume = volume + stretch[:, 0]
        return 0.5 * (x**2).sum(1) + math.log(2 * math.pi) - volume
