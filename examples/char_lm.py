"""A language model of characters, on the prose of Python's own documentation (``pydoc_data.topics``).

Shows a causal transformer, cross-entropy over every position of a sequence, a metric of your own that is
exact over all of the data (perplexity), AdamW, clipping, and a cosine schedule with a warm-up.

    epochal train examples/char_lm.py
    epochal train examples/char_lm.py --width 32 --layers 1 --context 32 --epochs 1
"""

from __future__ import annotations

import math
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import epochal


def plan(width: int = 96, layers: int = 2, context: int = 64, epochs: int = 8, lr: float = 3e-3) -> epochal.Plan:
    """A causal transformer on the prose of Python's documentation.

    Args:
        width: how many numbers stand for a character; 32 of them for each attention head.
        layers: transformer blocks.
        context: characters in a sequence.
        lr: the learning rate after the warm-up.
    """
    text = "\n\n".join(topics.values())
    alphabet = sorted(set(text))
    tokens = torch.tensor([alphabet.index(letter) for letter in text])
    held_back = len(tokens) // 10  # the end of the text, so that no sequence has been seen in part
    return epochal.Plan(
        CausalTransformer(len(alphabet), width, layers, context),
        sequences(tokens[:-held_back], context),
        val=sequences(tokens[-held_back:], context),
        loss="cross_entropy",
        optimizer="adamw",
        lr=lr,
        weight_decay=0.1,
        schedule=epochal.Schedule("cosine", warmup=100),
        clip=1.0,
        metrics=[epochal.Metric("perplexity", surprise, perplexity, higher_is_better=False)],
        epochs=epochs,
    )


def sequences(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (n, context): the targets are one character ahead."""
    usable = (len(tokens) - 1) // context * context
    return tokens[:usable].view(-1, context), tokens[1 : usable + 1].view(-1, context)


def surprise(outputs: Tensor, targets: Tensor) -> Tensor:
    """What is summed over the batches: the negative log-likelihood, and the number of characters."""
    total = F.cross_entropy(outputs, targets, reduction="sum").double()
    return torch.stack([total, torch.full_like(total, targets.numel())])


def perplexity(sums: Tensor) -> float:
    """exp of the mean: as unsure as if that many characters were equally likely."""
    total, count = sums.tolist()
    return math.exp(total / count)


class CausalTransformer(nn.Module):
    """Tokens (n, t) to scores (n, alphabet, t), the shape that cross-entropy takes; no position sees a later one."""

    def __init__(self, alphabet: int, width: int, layers: int, context: int):
        super().__init__()
        self.letters = nn.Embedding(alphabet, width)
        self.places = nn.Parameter(0.02 * torch.randn(context, width))
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 32), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.scores = nn.Linear(width, alphabet)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        hidden = self.blocks(self.letters(tokens) + self.places[:length], mask=mask, is_causal=True)
        return self.scores(hidden).transpose(1, 2)
