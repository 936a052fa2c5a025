"""What several processes have to be given alike, compared before they train: options and data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from epochal.data.fingerprint import fingerprint, held
from epochal.describe import config
from epochal.errors import DataError, PlanError
from epochal.feeding import Data
from epochal.runtime import processes

if TYPE_CHECKING:
    from epochal.plan import Plan


def refuse_different_plans(plan: Plan) -> None:
    """PlanError if the processes were given different options, as a seed of each one's own."""
    if processes.world().size == 1:
        return
    options = config(plan)
    told = [(name, options.get(name)) for name in plan.__dataclass_fields__ if name != "device"]
    for rank, apart in enumerate(processes.unlike(told)):
        if apart is not None:
            _, (name, one), (_, theirs) = apart
            what = f"the processes were given different options: {name} is not the same in all of them."
            fix = "give all the same: each draws its own random numbers, and takes its share of the data, by itself"
            raise PlanError(what, where=f"rank 0 has {name}={one!r}, rank {rank} has {name}={theirs!r}", fix=fix)


def compared(data: Data) -> Iterator[str]:
    """DataError if the processes do not have the same data, as where each draws some without a seed.

    Of a data set whose samples only it knows, a word: of the arrays in it not all may be data.
    """
    if processes.world().size == 1:
        return
    for side, loader in {"train": data.train, "val": data.val}.items():
        told = processes.gather(None if loader is None else fingerprint(loader))
        if apart := [str(rank) for rank, one in enumerate(told) if one != told[0]]:
            what = f"the processes have different data in {side}."
            fix = "make them alike in every process (seed whatever draws them); each gets its share of every batch"
            raise DataError(what, where=f"rank {', '.join(apart)} against rank 0", fix=fix)
        apart = processes.unlike([] if loader is None else list(held(loader).items()))
        if found := next(((rank, one) for rank, one in enumerate(apart) if one is not None), None):
            rank, (_, *both) = found
            name = next(one for one in both if one is not None)[0]
            yield f"{name} of {side} differs between rank 0 and {rank}: if it is data, seed it: samples are left out."
    if data.batch_size < processes.world().size:
        yield f"a batch of {data.batch_size} keeps no more than {data.batch_size} of the processes busy."
