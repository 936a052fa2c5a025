"""The one place where a file in torch's own format is read: weights and plain values only, and only when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def read_pt(path: str | Path, device: str = "cpu") -> Any:
    """What a ``.pt`` file holds: tensors and plain values. Its numbers are not read onto the device ``"meta"``.

    torch raises any of a dozen classes, by what is wrong with the file; nothing in it is run.
    """
    return torch.load(path, map_location=device, weights_only=True)
