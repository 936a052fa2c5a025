"""Rules over the rows of the history: what the model is too close to, or not yet close enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from epochal.doctor.finding import Seen, rule
from epochal.observe.fitting import gap, improvement, overfitting_since

if TYPE_CHECKING:
    from epochal.doctor.watch import Story


@rule("overfitting", "info", "rows")
def overfitting(story: Story) -> Iterator[Seen]:
    """The model learns its data by heart: what it gains on train, it loses on all that is new.

    Looks at the history: val_loss has stayed above its lowest in at least three evaluations, by a tenth of its range,
    while train_loss went on falling.
    """
    if (since := overfitting_since(story.rows)) is not None:
        yield Seen(
            f"the model has been overfitting since epoch {since}.",
            f"val_loss rises while train_loss falls; {gap(story.rows[-1])}",
            f"epoch {since} on",
            "give patience=5, more data, augmentation, dropout or weight_decay=0.01, or a smaller model",
        )


@rule("too-few-epochs", "info", "rows")
def too_few_epochs(story: Story) -> Iterator[Seen]:
    """The run ended while the model was still learning: what it could do is not known.

    Looks at the history of a run that has ended: over the last fifth of its evaluations the loss fell by more than 1
    of 100 each.
    """
    better = improvement(story.rows) if story.is_over else None
    if better is not None and better > 0.01:
        yield Seen(
            "the run ended while the model was still improving.",
            f"the loss fell by {better:.1%} an evaluation at the end (1 % is still learning)",
            f"the last of {len(story.rows)} evaluations",
            "give more epochs, or a larger patience; resume=True goes on with a run that was saved",
        )
