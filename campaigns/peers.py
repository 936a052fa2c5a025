"""``python -m campaigns.peers``: other trainers under the kills, flips, resumes and NaNs of R1, R5, R8 and R12.

Each is written as its own documentation shows it, with a checkpoint at every step (by hand: at every epoch, as on
PyTorch's training page, whose dictionary knows epochs only). A peer that cannot be imported is left out. Every run is
compared with the undisturbed run of the same trainer: the order of the samples is not the same in all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import logging
import os
import random
import re
import shutil
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import epochal
from campaigns import harness

SAMPLES, BATCH = 38, 4  # ten batches an epoch, the last one smaller
SPOILT = 17  # the row with a NaN
LOSS = nn.CrossEntropyLoss()
Given = tuple[nn.Module, torch.optim.Optimizer, TensorDataset, TensorDataset]


def given(spoilt: bool = False) -> Given:
    """The same model, Adam and data each time. spoilt: with a NaN in one row of the training data."""
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(64)
    model = nn.Sequential(nn.Linear(6, 64), norm, nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 64), nn.Linear(64, 2))
    source = torch.Generator().manual_seed(7)
    x, y = torch.randn(SAMPLES + 20, 6, generator=source), torch.randint(0, 2, (SAMPLES + 20,), generator=source)
    x[SPOILT, 2] = torch.nan if spoilt else x[SPOILT, 2]
    train, val = TensorDataset(x[:SAMPLES], y[:SAMPLES]), TensorDataset(x[SAMPLES:], y[SAMPLES:])
    return model, torch.optim.Adam(model.parameters(), lr=0.01), train, val


def numbered(folder: Path, pattern: str) -> list[Path]:
    """What is there by that pattern, the highest number last."""
    return sorted(folder.glob(pattern), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


# Each trains to the end, from the newest checkpoint if there is one. best: whether it validates after each epoch and
# keeps the best weights; it gives the file of them, if there is one.


def with_epochal(folder: Path, epochs: int, given: Given, best: bool) -> Path | None:
    model, optimizer, train, val = given
    epochal.fit(
        model, train.tensors, val=val.tensors if best else None, loss=LOSS, optimizer=optimizer, epochs=epochs,
        batch_size=BATCH, seed=1, run=folder, resume=True, save=epochal.Saving("1 steps", keep=2, share=None),
    )  # fmt: skip
    return folder / "model.safetensors"


def by_hand(folder: Path, epochs: int, given: Given, best: bool) -> Path | None:
    model, optimizer, train, val = given
    torch.manual_seed(1)
    loader, path, begin, lowest = DataLoader(train, BATCH, shuffle=True), folder / "checkpoint.pt", 0, float("inf")
    if path.exists():
        checkpoint = torch.load(path)
        model.load_state_dict(checkpoint["model_state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        begin = checkpoint["epoch"] + 1
    for epoch in range(begin, epochs):
        model.train()
        for x, y in loader:
            loss = LOSS(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        state = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
        torch.save({"epoch": epoch, **state, "loss": loss}, path)
        lowest = lowest_kept(lowest, model, val, folder / "best.pt") if best else lowest
    return folder / "best.pt"


def lowest_kept(lowest: float, model: nn.Module, val: TensorDataset, path: Path) -> float:
    """Validates, and keeps the weights if no loss was lower."""
    model.eval()
    with torch.no_grad():
        loss = LOSS(model(val.tensors[0]), val.tensors[1]).item()
    if loss < lowest:
        torch.save(model.state_dict(), path)
    return loss if loss < lowest else lowest


def with_lightning(folder: Path, epochs: int, given: Given, best: bool) -> Path | None:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = given[0]

        def training_step(self, batch: Any, index: int) -> Tensor:
            return LOSS(self.model(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", LOSS(self.model(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return given[1]

    lightning.seed_everything(1)
    steps = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)
    kept = ModelCheckpoint(folder / "best", monitor="val_loss")
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, callbacks=[steps, kept] if best else [steps], logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=0,
    )  # fmt: skip
    loaders = DataLoader(given[2], BATCH, shuffle=True), DataLoader(given[3], 20) if best else None
    trainer.fit(Module(), *loaders, ckpt_path="last")
    return Path(kept.best_model_path) if kept.best_model_path else None


def with_accelerate(folder: Path, epochs: int, given: Given, best: bool) -> Path | None:
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.utils import set_seed

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    set_seed(1)
    model, optimizer, loader = accelerator.prepare(*given[:2], DataLoader(given[2], BATCH, shuffle=True))
    done, lowest = 0, float("inf")
    if found := numbered(folder, "step_*"):
        accelerator.load_state(str(found[-1]))
        done = int(found[-1].name.removeprefix("step_"))
    begin, skipped = divmod(done, len(loader))
    for epoch in range(begin, epochs):
        model.train()
        loader.set_epoch(epoch)
        for x, y in accelerator.skip_first_batches(loader, skipped) if epoch == begin and skipped else loader:
            optimizer.zero_grad()
            accelerator.backward(LOSS(model(x), y))
            optimizer.step()
            done += 1
            accelerator.save_state(str(folder / f"step_{done}"))
        lowest = lowest_kept(lowest, model, given[3], folder / "best.pt") if best else lowest
    return folder / "best.pt"


class WithLoss(nn.Module):
    """A model as transformers wants it: the loss is a part of its outputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(x)
        return {"loss": LOSS(logits, labels), "logits": logits}


def with_transformers(folder: Path, epochs: int, given: Given, best: bool) -> Path | None:
    import transformers
    from transformers.trainer_utils import get_last_checkpoint

    often: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    if best:
        often = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    options = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=BATCH, seed=1, max_grad_norm=0.0,
        lr_scheduler_type="constant", report_to=[], disable_tqdm=True, use_cpu=True, **often,
    )  # fmt: skip
    train, val = ([{"x": x, "labels": y} for x, y in samples] for samples in given[2:])
    parts: dict[str, Any] = {"optimizers": (given[1], None), "train_dataset": train, "eval_dataset": val}
    trainer = transformers.Trainer(WithLoss(given[0]), options, **parts)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    kept = trainer.state.best_model_checkpoint
    return Path(kept) / "model.safetensors" if kept else None


class Peer(NamedTuple):
    """module, save: where the function is that writes a checkpoint. pattern: of the checkpoints in a run's folder."""

    train: Callable[[Path, int, Given, bool], Path | None]
    package: str
    module: str
    save: str
    pattern: str


PEERS = {
    "epochal": Peer(with_epochal, "epochal", "epochal.checkpoint.store", "Checkpoints.commit", "checkpoints/step-*"),
    "torch.save by hand": Peer(by_hand, "torch", "torch", "save", "checkpoint.pt"),
    "Lightning": Peer(with_lightning, "lightning", "lightning.pytorch", "Trainer.save_checkpoint", "last.ckpt"),
    "transformers": Peer(with_transformers, "transformers", "transformers", "Trainer._save_checkpoint", "checkpoint-*"),
    "Accelerate": Peer(with_accelerate, "accelerate", "accelerate", "Accelerator.save_state", "step_*"),
}


def trained(peer: Peer, folder: Path, epochs: int, on_save: Callable = int, on_step: Callable = int) -> dict:
    """Trains or resumes to the end. Digests of weights and optimizer, seconds, and how many saves there were."""
    folder.mkdir(exist_ok=True)
    model, optimizer, *data = given()
    *owners, name = peer.save.split(".")
    owner = reduce(getattr, owners, importlib.import_module(peer.module))
    save, saves, began = getattr(owner, name), [], time.perf_counter()

    def timed(*arguments: Any, **named: Any) -> Any:
        on_save()
        start = time.perf_counter()
        done = save(*arguments, **named)
        saves.append(time.perf_counter() - start)
        return done

    def stepping(module: nn.Module, inputs: Any) -> None:
        if module.training:
            on_step()

    model.register_forward_pre_hook(stepping)
    with harness.changed(owner, **{name: timed}):
        peer.train(folder, epochs, (model, optimizer, *data), False)
    states = {"weights": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    digests = {name: harness.digest(state) for name, state in states.items()}
    times = {"run": time.perf_counter() - began, "save": statistics.median(saves or [0]), "saves": len(saves)}
    return {"digests": digests, **times}


def reference(peer: Peer, epochs: int) -> dict:
    """What two runs give that nothing disturbs."""
    with harness.scratch(on_disk=True) as folder:
        harness.warm(lambda: trained(peer, folder / "warm", epochs))
        one, other = (harness.ask(partial(trained, peer, folder / name, epochs)) for name in ("one", "other"))
    if one.error or other.error or one.value["digests"] != other.value["digests"]:
        raise RuntimeError(one.error or other.error or "two undisturbed runs differ")
    return {**other.value, "epochs": epochs}


def at(count: int, what: Callable[[], Any]) -> Callable[[], Any]:
    """Does something at the call of that number, from 1."""
    calls = itertools.count(1)
    return lambda: what() if next(calls) == count else None


def resumed(peer: Peer, folder: Path, expected: dict, errors: list[str]) -> str:
    """Resumes what was killed, and says how that ended; from the very beginning it is no achievement."""
    anew = "" if list(folder.glob(peer.pattern)) else " (begun anew)"
    ended = harness.ask(partial(trained, peer, folder, expected["epochs"]))
    errors += [ended.error] if ended.error else []
    same = ended.error is None and ended.value["digests"]["weights"] == expected["digests"]["weights"]
    return ("error" if ended.error else "same" if same else "other weights") + anew


def r1_kills(peer: Peer, expected: dict, errors: list[str], count: int) -> Iterator[str]:
    """One SIGKILL a run, every other one inside a save; then resumed to the end."""
    rng, killed = random.Random(1), 0
    while killed < count:
        with harness.scratch(on_disk=True) as folder:
            reached, mark = os.pipe()
            save = rng.randint(1, expected["saves"])
            on_save = at(save, partial(os.write, mark, b".")) if killed % 2 else int
            child = harness.Child(partial(trained, peer, folder / "run", expected["epochs"], on_save))
            os.close(mark)
            if killed % 2:
                os.read(reached, 1)
            time.sleep(rng.random() * expected["save" if killed % 2 else "run"])
            child.kill()
            os.close(reached)
            if child.wait().killed is not None:
                killed += 1
                yield resumed(peer, folder / "run", expected, errors)


def r8_resumes(peer: Peer, expected: dict, errors: list[str]) -> Iterator[str]:
    """Killed when a step begins, at every one of two epochs; then resumed to the end."""
    for step in range(2, 2 * -(-SAMPLES // BATCH) + 1):
        with harness.scratch(on_disk=True) as folder:
            killed = harness.ask(partial(trained, peer, folder / "run", 2, on_step=at(step, harness.kill_me))).killed
            yield resumed(peer, folder / "run", expected, errors) if killed else "not killed"


def r5_flips(peer: Peer, errors: list[str], count: int) -> Iterator[str]:
    """One bit of the largest file of the only checkpoint of a run that has ended; then resumed, to do nothing more."""
    rng = random.Random(5)
    with harness.scratch() as folder:
        expected = harness.ask(partial(trained, peer, folder / "run", 2)).value["digests"]
        *older, newest = numbered(folder / "run", peer.pattern)
        for path in older:
            shutil.rmtree(path)
        largest = max([newest, *newest.rglob("*")], key=lambda path: path.is_file() and path.stat().st_size)
        data = largest.read_bytes()
        for _ in range(count):
            shutil.copytree(folder / "run", folder / "copy", symlinks=True)
            hit = bytearray(data)
            hit[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            (folder / "copy" / largest.relative_to(folder / "run")).write_bytes(hit)
            ended = harness.ask(partial(trained, peer, folder / "copy", 2))
            errors += [ended.error] if ended.error else []
            same = ended.error is None and ended.value["digests"] == expected
            yield "error" if ended.error else "no effect" if same else "other values, no error"
            shutil.rmtree(folder / "copy")


def r12_nan(peer: Peer) -> str:
    """A NaN in one row: the weights in the end, the best ones on the disk, and what is said of it."""
    said, parts, end = io.StringIO(), given(spoilt=True), "trains on to its end"
    logging.getLogger().addHandler(logging.StreamHandler(said))
    warnings.simplefilter("always")
    with harness.scratch() as folder, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            kept = peer.train(folder, 3, parts, True)
        except Exception as error:
            kept, end = folder / "model.safetensors", f"stops with {type(error).__name__}"
            said.write(str(error))
        best = "not there"
        if kept and kept.exists():
            # Our own file, written a moment ago.
            state = load_file(kept) if kept.suffix == ".safetensors" else torch.load(kept, weights_only=False)
            best = finite(state.get("state_dict", state))
    named = [name for name in ("step", "row", "layer") if re.search(rf"\b{name}s? '?\d", said.getvalue())]
    return f"{end}; weights {finite(parts[0].state_dict())}, best {best}; names {', '.join(named) or 'nothing'}"


def finite(state: dict[str, Tensor]) -> str:
    return "finite" if all(torch.isfinite(value).all() for value in state.values()) else "NaN"


def counted(ends: Iterator[str]) -> str:
    return ", ".join(f"{count} {end}" for end, count in sorted(Counter(ends).items()))


def put_through(peer: Peer, kills: int, flips: int, errors: list[str]) -> Iterator[tuple[str, str]]:
    """The rows of a peer."""
    yield "R1", counted(r1_kills(peer, reference(peer, 3), errors, kills))
    yield "R8", counted(r8_resumes(peer, reference(peer, 2), errors))
    ended = harness.ask(lambda: r12_nan(peer))
    yield "R12", ended.value or f"error: {ended.error}"
    yield "R5", counted(r5_flips(peer, errors, flips))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m campaigns.peers", description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--flips", type=int, default=1000)
    chosen = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    harness.settle()
    table: dict[str, list[str]] = {"R1": [], "R5": [], "R8": [], "R12": []}
    for name, peer in PEERS.items():
        with contextlib.suppress(ImportError):
            version, errors = importlib.import_module(peer.package).__version__, []
            for row, found in put_through(peer, chosen.kills, chosen.flips, errors):
                table[row].append(f"  {name} {version}: {found}")
                print(row, table[row][-1], *sorted({error[:90] for error in errors})[:3], sep="\n    ", file=sys.stderr)
                errors.clear()
    print("\n".join(line for row, lines in table.items() for line in (row, *lines)))


if __name__ == "__main__":
    main()
