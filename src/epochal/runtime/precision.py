"""Mixed precision: the autocast region of a step, and the scaler that fp16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

PRECISIONS = ("fp32", "bf16", "fp16")


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The region in which forward and loss run; enter it again for every batch."""
    if precision == "fp32":
        return nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype)


def scaler(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """A loss scaler for fp16, whose gradients underflow without one; bf16 has the range of fp32."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None
