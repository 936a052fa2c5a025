"""Random generators: seeding them, deriving seeds, keeping and putting back their states."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from epochal.runtime.attributes import content, own

_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
RANKS = 4  # a stream of seeds, as those of data/order.py
_FEW, _MANY = 32, 1000  # parts of a list that is looked into (one of samples is not), and of all that is


def seed_everything(seed: int) -> None:
    """Seeds python's, numpy's and torch's global generators, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derive(*keys: int) -> int:
    """A seed (63 bits) that is a function of the keys, well mixed: near keys give unrelated seeds.

    Uses numpy's ``SeedSequence`` (O'Neill's seed_seq_fe).

    >>> derive(0, 1) == derive(0, 1), derive(0, 1) == derive(1, 0)
    (True, False)
    """
    words = [key % 2**64 for key in keys]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def diverge(rank: int, seed: int) -> None:
    """Gives every process but the first random numbers of its own, for dropout and the like: a function of both."""
    if rank:
        seed_everything(derive(seed, RANKS, rank))


def digest() -> int:
    """A number that differs where the state of torch's generator does; nothing is drawn."""
    return zlib.crc32(torch.get_rng_state().numpy().tobytes())


class Alike:
    """Random numbers that several processes have alike, beside each one's own.

    states: of the host's generators, to begin with.
    """

    def __init__(self, states: dict[str, Any]):
        self.states = states

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, the global generators of the host are these."""
        self._own = _host_states()
        _set_host_states(self.states)
        try:
            yield
        finally:
            self.states = _host_states()
            _set_host_states(self._own)

    def outside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, called with the process's own random numbers, where it is called inside."""

        def apart(*given: Any) -> Any:
            self.states = _host_states()
            _set_host_states(self._own)
            try:
                return function(*given)
            finally:
                self._own = _host_states()
                _set_host_states(self.states)

        return apart


def draw() -> int:
    """A seed drawn from torch's global generator, as torch's own samplers draw theirs."""
    return int(torch.empty((), dtype=torch.int64).random_().item())


def generator_states() -> dict[str, Any]:
    """The states of all global generators."""
    states = _host_states()
    for kind, home in accelerators().items():
        if getattr(home, "is_initialized", home.is_available)():  # asking others would start a device
            states[kind] = [home.get_rng_state(number) for number in range(home.device_count())]
    return states


def _host_states() -> dict[str, Any]:
    numpy = np.random.get_state(legacy=False)
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}


def _set_host_states(states: dict[str, Any]) -> None:
    _set_python_state(random, states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])


def accelerators() -> dict[str, Any]:
    """The modules of the accelerators that are there, by the type of their devices."""
    homes = {kind: getattr(torch, kind) for kind in ("cuda", "xpu", "mps")}
    return {kind: home for kind, home in homes.items() if home.is_available()}


def set_generator_states(states: dict[str, Any]) -> None:
    """Puts back what :func:`generator_states` gave."""
    _set_host_states(states)
    for kind, home in accelerators().items():
        for number, state in enumerate(states.get(kind, ())[: home.device_count()]):  # there may be fewer now
            home.set_rng_state(state, number)


def try_generator_states(states: dict[str, Any]) -> None:
    """Raises what :func:`set_generator_states` would raise, and changes no generator."""
    _set_python_state(random.Random(), states["python"])
    np.random.RandomState().set_state(states["numpy"])
    torch.Generator().set_state(states["torch"])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the host's generators start from ``seed``; afterwards they are as before.

    Only the generators that a data set can use on the host: the accelerator's stay out of it,
    so that nothing waits for the device.
    """
    python, numpy, torch_state = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


def generators_in(owner: Any) -> dict[str, Any]:
    """The generator objects that a loader or a data set keeps, by where they lie in it; each of them once.

    Looks at its attributes, and at those of its parts: a wrapped data set, samplers, transforms, the collate function,
    what a function holds; and into short lists of them.

    >>> from torch.utils.data import DataLoader
    >>> list(generators_in(DataLoader([1, 2, 3], shuffle=True, generator=torch.Generator())))
    ['.generator']
    """
    found, seen, places = {}, set(), [("", owner)]
    for place, one in places:  # grows while it is walked
        if id(one) in seen or len(seen) > _MANY:
            continue
        seen.add(id(one))
        if issubclass(type(one), _KINDS):  # a lazy object may not be ready to say what it is
            if not isinstance(one, random.SystemRandom):  # it has no state
                found[place] = one
            continue
        places += [(f"{place}.{name}", value) for name, value in _parts(one)]
    return found


def _parts(one: Any) -> list[tuple[str, Any]]:
    """What may hold a generator, with its name."""
    kind = type(one)
    if kind is MethodType:
        return [("self", one.__self__)]
    if kind is partial:
        return [("func", one.func), *((str(i), part) for i, part in enumerate(one.args)), *one.keywords.items()]
    if kind is FunctionType:
        cells = zip(one.__code__.co_freevars, one.__closure__ or ())
        return [(name, value) for name, cell in cells for value in content(cell)]
    if issubclass(kind, list | tuple):
        return [(str(i), part) for i, part in enumerate(one)] if len(one) <= _FEW else []
    if issubclass(kind, dict):
        return [(str(key), part) for key, part in one.items()] if len(one) <= _FEW else []
    if issubclass(kind, type | ModuleType | torch.Tensor | np.ndarray):
        return []
    return [(name, value) for name, value in own(one).items() if not hasattr(type(value), "__next__")]  # on its way


def own_states(owner: Any) -> dict[str, Any]:
    """The states of the generators that ``owner`` keeps (:func:`generators_in`), by their places."""
    return {place: _state_of(generator) for place, generator in generators_in(owner).items()}


def set_own_states(owner: Any, states: dict[str, Any]) -> None:
    """Puts back what :func:`own_states` gave, for the generators that are there."""
    generators = generators_in(owner)
    for place in generators.keys() & states.keys():
        generator, state = generators[place], states[place]
        if isinstance(generator, torch.Generator | np.random.RandomState):
            generator.set_state(state)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = state
        else:
            _set_python_state(generator, state)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state(legacy=False) if isinstance(generator, np.random.RandomState) else generator.getstate()


def _set_python_state(generator: Any, state: Any) -> None:
    version, internal, gauss = state
    generator.setstate((version, tuple(internal), gauss))
