"""Codes of what epochal refuses by itself, wherever it meets it; their pages, and nothing to look for."""

from __future__ import annotations

from collections.abc import Iterator

from epochal.doctor.finding import Seen, rule


@rule("raises", "error", "other")
def raises(case: object) -> Iterator[Seen]:
    """A pass over a batch, or an update, raises an error: the training would end there.

    Told with the layer that was running and the shapes of the batch.
    """
    return iter(())


@rule("out-of-time", "info", "other")
def out_of_time(case: object) -> Iterator[Seen]:
    """A check takes some seconds: where a pass or a batch takes long, some rules do not get to look.

    Told with what has not looked. Rules that cost nothing have always done so.
    """
    return iter(())


@rule("integer-inputs", "error", "batch")
def integer_inputs(case: object) -> Iterator[Seen]:
    """Layers with floating point weights take no integers; and a count or a byte wants to be scaled as well.

    An nn.Embedding takes them; images of bytes are divided by 255.
    """
    return iter(())
