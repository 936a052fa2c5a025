"""What a run ran on: versions, hardware, the commit of the user's code."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from typing import Any

import numpy as np
import psutil
import torch


def environment() -> dict[str, Any]:
    """Plain facts, for ``run.json``."""
    facts: dict[str, Any] = {
        "epochal": metadata.version("epochal"),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    if commit := git_commit():
        facts["git_commit"] = commit
    return facts


def git_commit() -> str | None:
    """The commit of the folder the run is started in, with ``+changes`` where files differ from it."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or not a repository: the run is none the worse
