"""``python -m campaigns [r1 r5 ...] [--small] [--json FILE]``: the programs one after the other, and a table."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

from campaigns.harness import LISTED, Outcome


def programs() -> dict[str, str]:
    """The modules by the number of their row: ``{"r1": "campaigns.r01_kill", ...}``."""
    found = sorted(Path(__file__).parent.glob("r[0-9][0-9]_*.py"))
    rows = {f"r{int(path.stem[1:3])}": f"campaigns.{path.stem}" for path in found}
    return rows | {"cli": "campaigns.cli_kills"}


def main() -> int:
    known = programs()
    parser = argparse.ArgumentParser(prog="python -m campaigns", description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"which to run, of {' '.join(known)}; all by default")
    parser.add_argument("--small", action="store_true", help="the small versions, as the tests run them")
    parser.add_argument("--json", type=Path, help="a file for the outcomes")
    given = parser.parse_args()
    chosen = [re.sub(r"^r?0*(?=\d)", "r", row.lower()) for row in given.rows] or list(known)
    if unknown := set(chosen) - known.keys():
        parser.error(f"there is no campaign {', '.join(sorted(unknown))}")
    outcomes = []
    for row in chosen:
        print(f"{row}: {importlib.import_module(known[row]).WHAT} ...", file=sys.stderr, flush=True)
        outcomes.append(importlib.import_module(known[row]).run("small" if given.small else "full"))
        _tell(outcomes[-1])
    _table(outcomes)
    if given.json:
        given.json.write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n")
    return 1 if any(one.failures for one in outcomes) else 0


def _tell(one: Outcome) -> None:
    for failure in one.failures[:LISTED]:
        print(f"  failed: {failure}", file=sys.stderr)
    if len(one.failures) > LISTED:
        print(f"  and {len(one.failures) - LISTED} more", file=sys.stderr)
    for name, value in one.figures.items():
        print(f"  {name}: {value:,.3g}" if isinstance(value, float) else f"  {name}: {value}", file=sys.stderr)


def _table(outcomes: list[Outcome]) -> None:
    width = max(len(one.what) for one in outcomes)
    print(f"{'':4} {'':{width}} {'tried':>9} {'failed':>7} {'seconds':>8}")
    for one in outcomes:
        print(f"{one.id:4} {one.what:{width}} {one.tried:9,} {len(one.failures):7,} {one.seconds:8,.1f}")


if __name__ == "__main__":
    sys.exit(main())
