"""How many faulty programs are found, and how many healthy ones are accused; ``python -m benchmarks.faults``."""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from benchmarks.faults import data_faults, healthy_losses, healthy_models, loop_faults, loss_faults, model_faults
from benchmarks.faults.judging import by_epochal, by_torch
from benchmarks.faults.program import PROGRAMS, Program, halves

FILES = data_faults, loss_faults, loop_faults, model_faults, healthy_models, healthy_losses


def judged(name: str) -> dict[str, Any]:
    """What is found in one program, as plain values."""
    from epochal.doctor import finding

    finding.RAISES = True  # a rule that fails is a bug to be seen
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    program, began = PROGRAMS[name], time.perf_counter()
    try:
        verdict = by_epochal(program)
        codes = [(one.level, one.code, one.what, one.measured) for one in verdict.findings]
        failure = None
    except Exception as error:
        import traceback

        codes, verdict, failure = [], None, "".join(traceback.format_exception(error)[-4:])
    plain = by_torch(program)
    return {
        "name": name, "cause": program.cause, "also": program.also, "codes": codes, "failure": failure, "torch": plain,
        "kind": program.make.__module__.rpartition(".")[2], "steps": verdict and verdict.steps,
        "is_checked": verdict and verdict.is_checked, "level": verdict and verdict.level,
        "check": verdict and verdict.seconds, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def is_found(row: dict[str, Any]) -> bool:
    """Whether it is said to be faulty: by an error or a warning, or by an info of the right code."""
    return any(level != "info" or code in _right(row) for level, code, *_ in row["codes"])


def place_of(row: dict[str, Any]) -> int | None:
    """Where the right cause stands among the findings, from 1."""
    return next((at + 1 for at, (_, code, *_) in enumerate(row["codes"]) if code in _right(row)), None)


def _right(row: dict[str, Any]) -> set[str]:
    return {row["cause"], *row["also"]}


def table(rows: list[dict[str, Any]]) -> str:
    """The figures of one half."""
    faulty = [row for row in rows if row["cause"]]
    healthy = [row for row in rows if not row["cause"]]
    places = [place_of(row) for row in faulty]
    accused = {
        level: sum(one == level for row in healthy for one, *_ in row["codes"]) for level in ("error", "warning")
    }
    by_plain = sum(row["torch"] is not None for row in faulty)
    checks = [row["check"] for row in rows if row["check"]]
    lines = [
        f"{len(faulty)} faulty programs          epochal        plain torch",
        f"  found                   {_share(sum(map(is_found, faulty)), faulty):>14} {_share(by_plain, faulty):>14}",
        f"  right cause first       {_share(sum(p == 1 for p in places), faulty):>14}",
        f"  right cause in three    {_share(sum(p is not None and p <= 3 for p in places), faulty):>14}",
        *_by_kind(faulty),
        f"{len(healthy)} healthy programs",
        f"  errors a program        {accused['error'] / max(1, len(healthy)):14.3f} "
        f"{sum(row['torch'] is not None for row in healthy) / max(1, len(healthy)):14.3f}",
        f"  warnings a program      {accused['warning'] / max(1, len(healthy)):14.3f}",
        f"a check takes {statistics.median(checks) if checks else 0:.1f} s in the median, "
        f"{max(checks, default=0):.1f} s at most",
    ]
    return "\n".join(lines)


def _by_kind(faulty: list[dict[str, Any]]) -> list[str]:
    """Of each kind, how many a check has, and what the run tells by itself, how surely and after how many updates."""
    lines = ["  the right cause               check   the run: errors, within one update; later; warnings, infos"]
    for kind in dict.fromkeys(row["kind"] for row in faulty):
        rows = [row for row in faulty if row["kind"] == kind]
        by_run = [row for row in rows if row["steps"] is not None]
        proved = [row["steps"] for row in by_run if row["level"] == "error"]
        early = sum(step <= 1 for step in proved)
        lines.append(
            f"    {kind.replace('_', ' '):<14} of {len(rows):<7} {sum(map(is_checked, rows)):7} "
            f"{len(by_run):9} {len(proved):7} {early:19} {len(proved) - early:6} {len(by_run) - len(proved):16}"
        )
    return lines


def is_checked(row: dict[str, Any]) -> bool:
    return bool(row["is_checked"])


def _share(count: int, of: list[Any]) -> str:
    return f"{count} ({count / max(1, len(of)):.0%})"


def told(row: dict[str, Any]) -> str:
    """A program that is not judged rightly, in a line or two."""
    found = "; ".join(f"{level} {code}" for level, code, *_ in row["codes"]) or "nothing"
    failed = f"\n{row['failure']}" if row["failure"] else ""
    return f"  {row['name']} ({row['cause'] or 'healthy'}): {found}{failed}"


def is_right(row: dict[str, Any]) -> bool:
    if row["failure"]:
        return False
    return place_of(row) == 1 if row["cause"] else not any(level != "info" for level, *_ in row["codes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--half", choices=("tuned", "scored", "both"), default="both")
    parser.add_argument("--kind", choices=("faulty", "healthy"))
    parser.add_argument("--only", nargs="*", help="names, or parts of them")
    parser.add_argument("--details", action="store_true", help="what was measured, too")
    parser.add_argument("--json", type=Path, help="a file for what was found")
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args()
    tuned, scored = halves(PROGRAMS)
    parts = {"tuned": tuned, "scored": scored}
    for half in ("tuned", "scored") if chosen.half == "both" else (chosen.half,):
        wanted = [one for one in parts[half] if not chosen.kind or (one.cause is not None) is (chosen.kind == "faulty")]
        rows = _run(wanted, chosen.only, chosen.processes)
        print(f"\nthe half that was {'tuned on' if half == 'tuned' else 'only scored'}\n{table(rows)}")
        wrong = [row for row in rows if not is_right(row)]
        print(f"not judged rightly ({len(wrong)}):")
        for row in wrong:
            print(told(row))
            if chosen.details:
                print(
                    "".join(
                        f"      {level} {code}: {what} [{measured}]\n" for level, code, what, measured in row["codes"]
                    ),
                    end="",
                )
        if chosen.json:
            chosen.json.with_suffix(f".{half}.json").write_text(json.dumps(rows, indent=1))


def _run(programs: list[Program], only: list[str] | None, processes: int) -> list[dict[str, Any]]:
    names = [one.name for one in programs if not only or any(part in one.name for part in only)]
    if processes == 1:
        return [judged(name) for name in names]
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        return list(pool.map(judged, names))


if __name__ == "__main__":
    main()
