"""Hidden characters, guessed from both sides: a model of masked tokens, on the prose of ``pydoc_data.topics``.

Shows ``objective=``: a loss for any calling shape. Each batch hides another number of characters, and only those
count, so the objective says how many they were; the means over batches are then means over hidden characters.

    epochal train examples/masked_tokens.py
    epochal train examples/masked_tokens.py --width 32 --layers 1 --length 32 --epochs 1
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import epochal

HIDDEN = 0  # the token that stands for a hidden character; the alphabet begins at 1


def plan(width: int = 128, layers: int = 1, length: int = 64, epochs: int = 8, lr: float = 5e-3) -> epochal.Plan:
    """A two-way LSTM that guesses hidden characters.

    Args:
        width: how many numbers stand for a character, and the units in each direction.
        layers: of the LSTM.
        length: characters in a sequence.
        lr: the learning rate after the warm-up.
    """
    text = "\n\n".join(topics.values())
    alphabet = ["hidden", *sorted(set(text))]
    tokens = torch.tensor([alphabet.index(letter) for letter in text])
    sequences = tokens[: len(tokens) // length * length].view(-1, length)
    held_back = len(sequences) // 10
    return epochal.Plan(
        TwoWay(len(alphabet), width, layers),
        sequences[:-held_back],
        val=sequences[-held_back:],
        objective=guess_the_hidden,
        optimizer="adamw",
        lr=lr,
        schedule=epochal.Schedule("cosine", warmup=100),
        clip=1.0,
        metrics=["accuracy"],
        epochs=epochs,
    )


def guess_the_hidden(model: nn.Module, tokens: Tensor) -> epochal.Loss:
    """The mean cross-entropy over the hidden characters of tokens (n, length)."""
    # Every evaluation hides the same characters, so that any two can be compared.
    dice = None if model.training else torch.Generator(tokens.device).manual_seed(0)
    hidden = torch.rand(tokens.shape, generator=dice, device=tokens.device) < 0.15
    scores, truth = model(tokens.masked_fill(hidden, HIDDEN))[hidden], tokens[hidden]
    return epochal.Loss(cross_entropy(scores, truth), weight=hidden.sum(), outputs=scores, targets=truth)


class TwoWay(nn.Module):
    """Tokens (n, t) to scores (n, t, alphabet), from what stands before and after."""

    def __init__(self, alphabet: int, width: int, layers: int):
        super().__init__()
        self.letters = nn.Embedding(alphabet, width)
        self.reader = nn.LSTM(width, width, layers, bidirectional=True, batch_first=True)
        self.scores = nn.Linear(2 * width, alphabet)

    def forward(self, tokens: Tensor) -> Tensor:
        read, _ = self.reader(self.letters(tokens))
        return self.scores(read)
