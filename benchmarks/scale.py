"""What many processes cost: simulated up to 4,096, and measured with 1, 2 and 4. The tables of docs/scale.md.

    python benchmarks/scale.py [--only ranks samples traffic memory speed store] [--rounds 3]

ranks: torch's fake process group, in which every exchange returns at once with this process's own values, so that one
process plays one rank of many, through a whole run. samples: the order of an epoch. traffic: the exchanges of an
update, an evaluation and a checkpoint, counted. memory: what lies in a process, against the formulas. speed: samples a
second, of one thread each. store: how quickly the pulses are read. Ratios travel better than seconds do.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import epochal

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import group

MIB = 2**20


class Tall(nn.Module):
    """A block with more rows than there are processes, so that each has some of them."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 4096)

    def forward(self, x):
        return x + torch.relu(self.up(x)).view(len(x), 8, 512).mean(-1) / 100  # 200 of them stay within float32


class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def tall(blocks):
    return nn.Sequential(nn.Linear(8, 8), *[Tall() for _ in range(blocks)], nn.Linear(8, 1))


def wide(width, blocks):
    return nn.Sequential(*[Wide(width) for _ in range(blocks)], nn.Linear(width, 1))


def private():
    return psutil.Process().memory_full_info().uss


class Exchanges(TorchDispatchMode):
    """Notes each exchange, and the bytes that this process sends for it if it is done in a ring."""

    PARTS = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "allgather_": 1}

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name, tensors = function.__name__.partition(".")[0], list(_tensors(args))
            largest = tensors[:1] if name == "_allgather_base_" else tensors[1:] if "_base_" in name else tensors
            largest = largest[: self.size] if name == "allgather_" else largest
            sent = sum(t.nbytes for t in largest) * self.PARTS.get(name, 1)
            self.found.append((name, sent * (self.size - 1) / self.size if name in self.PARTS else sent))
        return function(*args, **(kwargs or {}))

    def take(self):
        found, self.found = self.found, []
        return found


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


@contextlib.contextmanager
def pretending(rank, size):
    """Inside, this process is one of so many, and alone."""
    import torch.testing._internal.distributed.fake_pg  # it makes the backend known

    from epochal.runtime import parallel, processes

    dist.init_process_group("fake", rank=rank, world_size=size, store=dist.HashStore())
    processes.aside = lambda patience: processes.Group()
    if rank:  # what the first would tell, each says itself
        processes.Group.first = lambda group, make: make()

    def add_up(_, bucket):
        dist.all_reduce(bucket.buffer())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    class Replica(nn.parallel.DistributedDataParallel):
        """With a hook, for a fake exchange promises no values."""

        @functools.wraps(nn.parallel.DistributedDataParallel.__init__)
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.register_comm_hook(None, add_up)

    parallel.DistributedDataParallel = Replica
    yield


def play(_, rank, size, kind, blocks):
    """Seconds of each part of a run in a process that plays a rank, and what it takes in memory."""
    with pretending(rank, size):
        model, batch = tall(blocks), 2 * size
        X = torch.zeros(2 * batch, 8)
        began, before = time.perf_counter(), private()
        plan = epochal.Plan(
            model, (X, X[:, :1]), val=(X[:batch].clone(), X[:batch, :1]), loss="mse", optimizer="adamw", strategy=kind,
            batch_size=batch, evaluate_every="2 steps", max_steps=2, observers=(), seed=0, restore_best=False,
        )  # fmt: skip
        run, took, steps = plan.prepare(), {}, []
        took["prepare"] = time.perf_counter() - began
        with run:
            for event in run:
                if isinstance(event, epochal.StepDone):
                    steps.append(time.perf_counter())
                elif isinstance(event, epochal.Evaluated):
                    took["update"], took["evaluate"] = steps[-1] - steps[-2], time.perf_counter() - steps[-1]
                    began = time.perf_counter()
                    snapshot = snapshot_of(run.state_dict(), rank, size)
                    took["snapshot"] = time.perf_counter() - began
                    began, memory = time.perf_counter(), private() - before
        took["end"] = time.perf_counter() - began
        return took, memory, sum(map(nbytes, snapshot.values())), manifest_of(snapshot, size)


def snapshot_of(state, rank, size):
    """What a saver copies to the host."""
    from epochal.checkpoint import codec, saver
    from epochal.checkpoint.sharded import shared_out, writers

    named = codec.encode(state)[1]
    return {n: saver._copied(tensor) for n, tensor in shared_out(named, rank, writers(named, size)).items()}


def nbytes(copied):
    return (copied if isinstance(copied, torch.Tensor) else copied.tensor).nbytes


def manifest_of(snapshot, size):
    """The bytes of the manifest, if every process had written what this one has."""
    from epochal.checkpoint import manifest
    from epochal.checkpoint.manifest import File, Written

    told = {n: one.whole for n, one in snapshot.items() if not isinstance(one, torch.Tensor)}
    whole = manifest.described({n: one for n, one in snapshot.items() if isinstance(one, torch.Tensor)})
    others = [Written({f"tensors-{rank:05d}.safetensors": File(10**9, "0" * 64)}, {}, True) for rank in range(size)]
    return len(manifest.describe(1, [Written({}, told | whole, bool(told)), *others]))


def print_ranks():
    print("\n| strategy | ranks | rank | prepare s | update s | evaluate s | snapshot s | end s | private MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in ("ddp", "fsdp"):
        for size in (8, 64, 512, 4096):
            for rank in (0, size // 2, size - 1) if size == 4096 else (0,):
                ((took, memory, copied, listed),) = group.run(play, 1, rank, size, kind, 200, seconds=120)
                times = " | ".join(f"{took[name]:.2f}" for name in ("prepare", "update", "evaluate"))
                saved = f"{took['snapshot']:.2f} ({copied / MIB:.2f} MiB copied) | {took['end']:.2f}"
                print(f"| {kind} | {size:,} | {rank:,} | {times} | {saved} | {memory / MIB:.0f} |", flush=True)
        print(f"\n{kind}: the manifest of {size:,} processes has {listed / MIB:.2f} MiB\n", flush=True)


def order(_, samples, kind):
    """Seconds until the first batch of an epoch is there, its batches a second, and what lies in memory meanwhile."""
    from epochal.data.loader import Loader
    from epochal.data.share import Part

    part, X = Part(4095, 4096), torch.zeros(1).expand(samples, 1)
    began, before = time.perf_counter(), private()
    if kind == "loader":
        batches = Loader((X,), 8192, shuffle=True, part=part).batches(0)
    else:
        from epochal.data.shared import _Parts

        sampler = torch.utils.data.RandomSampler(X)
        batches = iter(_Parts(torch.utils.data.BatchSampler(sampler, 8192, False), part))
    next(batches)
    first, memory = time.perf_counter() - began, private() - before
    began, count = time.perf_counter(), sum(1 for _ in batches)
    return first, count / (time.perf_counter() - began), memory


def print_samples():
    print("\n| order of | samples | first batch after s | then batches a second | private MiB | bytes a sample |")
    print("|---|---|---|---|---|---|")
    for kind in ("loader", "DataLoader"):
        for samples in (10**5, 10**6, 10**7):
            ((first, rate, memory),) = group.run(order, 1, samples, kind)
            told = f"{first:.3f} | {rate:,.0f} | {memory / MIB:.1f} | {memory / samples:.0f}"
            print(f"| {kind} | {samples:,} | {told} |", flush=True)


def count(_, size, options):
    """The exchanges of the third update, of an evaluation, and of what precedes a checkpoint."""
    with pretending(0, size):
        torch.manual_seed(0)
        X = torch.randn(12 * size, 256)
        plan = epochal.Plan(
            wide(256, 8), (X, X[:, :1]), val=(X[:size].clone(), X[:size, :1]), loss="mse", optimizer="adamw",
            batch_size=size,
            metrics=["r2"], evaluate_every="3 steps", max_steps=3, observers=(), seed=0, **options,
        )  # fmt: skip
        counted, exchanges = {}, Exchanges(size)
        with plan.prepare() as run, exchanges:
            for event in run:
                counted[type(event).__name__, run.state.progress.step] = exchanges.take()
                if isinstance(event, epochal.Evaluated):
                    run.ending.agreement.align(run.state.modules)
                    run.state_dict()
                    counted["Saved"] = exchanges.take()
        return counted["StepDone", 3], counted["Evaluated", 3], counted["Saved"]


def predicted(size, kind, *, half, pieces):
    """Bytes that a process sends in a ring for an update of the model above; and how many more that are by padding:
    FSDP cuts by rows, and fills up a weight so that all parts have as many.
    """
    *blocks, root = wide(256, 8)

    def send(fill):
        inner, outer = (sum(fill(p.shape) for b in some for p in b.parameters()) for some in (blocks, [root]))
        if kind == "ddp":
            return 2 * (size - 1) / size * 4 * (inner + outer + 10)
        # The last layer is no block: it stays together between the forward and the backward pass.
        gathered = pieces * (2 * inner + outer) * (2 if half else 4)
        return (size - 1) / size * (gathered + 4 * (inner + outer) + 2 * 8 * 13)

    plain = send(lambda shape: shape.numel())
    padded = send(lambda shape: -(-shape[0] // size) * size * (shape.numel() // shape[0]))
    return plain, (padded - plain if kind == "fsdp" else 0)


def print_traffic():
    print("\n| strategy | ranks | exchanges of an update | MiB sent | predicted | an evaluation's | a checkpoint's |")
    print("|---|---|---|---|---|---|---|")
    for size in (8, 512):
        for kind, options in (
            ("ddp", {}), ("fsdp", {}), ("fsdp", {"precision": "bf16"}), ("fsdp", {"accumulate": 4}),
        ):  # fmt: skip
            ((update, evaluation, saving),) = group.run(count, 1, size, {"strategy": kind, **options})
            half, pieces = "precision" in options, options.get("accumulate", 1)
            told = f"{kind}{''.join(f', {name} {value}' for name, value in options.items())}"
            sent = sum(sent for _, sent in update) / MIB
            plain, padding = (said / MIB for said in predicted(size, kind, half=half, pieces=pieces))
            said = f"{plain:.2f} and {padding:.2f} of padding" if padding >= 0.005 else f"{plain:.2f}"
            others = f"{len(evaluation)} | {len(saving)}"
            print(f"| {told} | {size} | {len(update)} | {sent:.2f} | {said} | {others} |", flush=True)


def weigh(rank, kind, size):
    """Bytes in this process of each kind, after three updates and an evaluation."""
    torch.manual_seed(0)
    X = torch.randn(512, 256)
    model = wide(256, 8)
    before = private()
    plan = epochal.Plan(
        model, (X, X[:, :1]), val=(X[:64].clone(), X[:64, :1]), loss="mse", optimizer="adamw", lr=1e-3, max_steps=3,
        evaluate_every="3 steps", batch_size=64, observers=(), seed=0, strategy=kind,
    )  # fmt: skip
    with plan.prepare() as run:
        for event in run:
            if isinstance(event, epochal.Evaluated):
                moments = (part for state in run.state.optimizer.state.values() for part in state.values())
                return {
                    "weights": held(model.parameters()),
                    "gradients": held(p.grad for p in model.parameters()),
                    "optimizer": held(moments),
                    "best weights": held(run.best.weights[0].values()),
                    "snapshot": sum(map(nbytes, snapshot_of(run.state_dict(), rank, size).values())),
                    "private": private() - before,
                }
    return None


def held(tensors):
    """Bytes of the memory in which these lie, here."""
    from epochal.runtime.shards import local

    storages = {s.data_ptr(): s.nbytes() for s in (local(tensor.detach()).untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def print_memory():
    names = ("weights", "gradients", "optimizer", "best weights", "snapshot")
    whole = sum(p.nbytes for p in wide(256, 8).parameters())
    print(f"\n| strategy | processes | {' | '.join(names)} | weights and optimizer of one process's | private MiB |")
    print("|---|---|" + "---|" * (len(names) + 2))
    for kind, sizes in (("ddp", (1, 2, 4)), ("fsdp", (2, 4))):
        for size in sizes:
            told = group.run(weigh, size, kind, size)
            worst = {name: max(one[name] for one in told) for name in told[0]}
            part = size if kind == "fsdp" else 1
            said = (whole / part, whole / part, 2 * whole / part, whole / part, 4 * whole / size)
            cells = [f"{worst[name] / MIB:.2f} of {one / MIB:.2f}" for name, one in zip(names, said)]
            ratio = (worst["weights"] + worst["optimizer"]) / (3 * whole)
            print(f"| {kind} | {size} | {' | '.join(cells)} | {ratio:.4f} | {worst['private'] / MIB:.0f} |", flush=True)
            if (kind, size) == ("fsdp", 4):
                print(f"\nfsdp, 4 processes: {ratio / 0.25:.4f} of a quarter")


def race(rank, kind, batch, steps):
    """Samples a second, over all processes, in the median update after the first four."""
    torch.manual_seed(0)
    X, times = torch.randn(batch * steps, 256), []

    def note(event):
        if isinstance(event, epochal.StepDone):
            times.append(time.perf_counter())

    epochal.fit(
        wide(256, 4), (X, X[:, :1]), loss="mse", optimizer="adamw", epochs=1, batch_size=batch, seed=0, strategy=kind,
        evaluate_every="1000 steps", observers=[note] if rank == 0 else (),
    )  # fmt: skip
    return batch / statistics.median(after - before for before, after in pairwise(times[4:])) if times else None


def print_speed(rounds):
    kinds = [(kind, each, size) for kind in ("ddp", "fsdp") for each in (False, True) for size in (2, 4)]
    alone, rates = [], {one: [] for one in kinds}
    for _ in range(rounds):
        alone += group.run(race, 1, "auto", 256, 10)
        for kind, each, size in kinds:
            rates[kind, each, size].append(group.run(race, size, kind, 256 * (size if each else 1), 10)[0])
    print(f"\none process: {statistics.median(alone):,.0f} samples a second, {min(alone):,.0f} to {max(alone):,.0f}\n")
    print("| strategy | samples in a batch | processes | of one process's speed | in single rounds |")
    print("|---|---|---|---|---|")
    for (kind, each, size), found in rates.items():
        ratios = [rate / other for rate, other in zip(found, alone)]
        told = f"256 {'each' if each else 'in all'} | {size} | {statistics.median(ratios):.2f}"
        print(f"| {kind} | {told} | {min(ratios):.2f} to {max(ratios):.2f} |")


def print_store():
    """Of the store that the pulses go to: what it takes in a second, and how long one reads those of all the others."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client, count, beat = dist.TCPStore("127.0.0.1", store.port), 4096, "123|step 12345, model.py:123, in forward"
    keys = [f"epochal/pulse/{rank}" for rank in range(count)]
    began = time.perf_counter()
    for _ in range(10):
        for key in keys:
            client.set(key, beat)
    client.get(keys[-1])
    sets, began = 10 * count / (time.perf_counter() - began), time.perf_counter()
    for key in keys:
        client.check([key]), client.get(key)
    one, began = time.perf_counter() - began, time.perf_counter()
    client.check(keys), client.multi_get(keys)
    print(f"\nstore: {sets:,.0f} beats a second; {count:,} pulses read one by one in {one:.3f} s,", end=" ")
    print(f"all at once in {time.perf_counter() - began:.3f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("ranks", "samples", "traffic", "memory", "speed", "store")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    began = time.perf_counter()
    for part in options.only:
        globals()[f"print_{part}"](*([options.rounds] if part == "speed" else []))
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
