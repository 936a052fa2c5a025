"""Run folders, from their files alone: the next free one, what one holds, and how facts are printed."""

from __future__ import annotations

import difflib
import sys
import textwrap
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from epochal.errors import PlanError, RunFolderError
from epochal.observe.console import aligned, is_terminal, number, painter, terminal_width

RUNS = Path("runs")
NO_BREAK = "\N{NO-BREAK SPACE}"  # between words of a fact that belong on one line


def new_folder(name: str) -> Path:
    """The next free one of ``runs/name-1``, ``runs/name-2``, ...; it is made at once, so that no other run takes it."""
    for place in count(1):
        folder = RUNS / f"{name}-{place}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:
            pass  # the recorder will say what is wrong with it
        break
    return folder


def existing(folder: Path) -> Path:
    """The folder itself. Raises RunFolderError, with the nearest name, where there is none."""
    if folder.is_dir():
        return folder
    beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, beside, n=1)
    fix = f"did you mean {folder.with_name(near[0])}?" if near else "epochal runs ls FOLDER lists those in a folder"
    raise RunFolderError("there is no such run folder.", where=str(folder), fix=fix)


def refuse_missing_folder(path: Path, flag: str) -> None:
    """Before anything is measured for a file that could not be written."""
    if path.is_dir():
        raise PlanError("this is a folder.", where=f"{flag} {path}", fix="name a file")
    if not path.parent.is_dir():
        fix = "make the folder first, or name a file in another one"
        raise PlanError("the folder does not exist.", where=f"{flag} {path}", fix=fix)


def held(folder: Path) -> list[str]:
    """The names of what a folder holds; those of folders end in a slash."""
    return sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))


def numbers(row: Mapping[str, Any], prefix: str = "") -> str:
    """The numbers of a row of the history whose names begin with ``prefix``."""
    named = {name: value for name, value in row.items() if name.startswith(prefix) and isinstance(value, int | float)}
    return ", ".join(f"{name}{NO_BREAK}{number(value)}" for name, value in named.items())


def print_facts(facts: Mapping[str, str]) -> None:
    """Prints a line a fact, label and text, to stdout; on a terminal, long texts are wrapped."""
    terminal = is_terminal(sys.stdout)
    width = max(20, terminal_width(sys.stdout) - max(map(len, facts)) - 3) if terminal else sys.maxsize
    wrapped = {label: textwrap.fill(text, width, break_on_hyphens=False) for label, text in facts.items()}
    print(aligned(wrapped, painter(sys.stdout, terminal)).replace(NO_BREAK, " "), end="")
