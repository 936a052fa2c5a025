"""One pass as it is made: which layers ran on what, which losses were computed over what, and how it went back."""

from __future__ import annotations

import sys
import threading
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.nn import functional
from torch.nn.modules import module as modules
from torch.nn.modules.loss import _Loss
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode, _push_mode

# torch's losses as they are called, by the names of epochal.
LOSSES: dict[Callable, str] = {
    functional.mse_loss: "mse", torch._C._nn.mse_loss: "mse",
    functional.l1_loss: "l1", torch._C._nn.l1_loss: "l1",
    functional.smooth_l1_loss: "smooth_l1", torch._C._nn.smooth_l1_loss: "smooth_l1",
    functional.huber_loss: "huber", torch._C._nn.huber_loss: "huber",
    functional.cross_entropy: "cross_entropy", functional.nll_loss: "nll",
    functional.binary_cross_entropy: "bce", functional.binary_cross_entropy_with_logits: "bce_with_logits",
}  # fmt: skip
_BINARY = {"add", "sub", "rsub", "mul", "div", "__rsub__", "__radd__", "__rmul__", "square_difference", "subtract"}
_ASKED = {"gt", "ge", "lt", "le", "__gt__", "__ge__", "round", "argmax", "eq", "__eq__", "ne"}
_OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


class Call(NamedTuple):
    """A loss of torch's as it was called: over which tensors, where (``train.py:41``), and what it gave.

    is_weighted: with a weight for each entry of a binary cross-entropy.
    """

    name: str
    outputs: Tensor
    targets: Tensor
    reduction: str
    result: Tensor
    place: str
    ignore_index: int = -100
    is_weighted: bool = False


class Layer(NamedTuple):
    """A module as it was called. shape: of its first input; output_ids: of the tensors that it gave. input and output
    themselves are kept in a full trace alone, with the versions of their memory.
    """

    path: str
    module: nn.Module
    is_training: bool
    shape: tuple[int, ...]
    output_ids: frozenset[int]
    input: Tensor | None = None
    output: Any = None
    input_version: int = 0
    output_version: int = 0


class Operation(NamedTuple):
    """An operation that a rule wants to see: its name, its inputs, its result, and where it stands."""

    name: str
    inputs: tuple[Any, ...]
    result: Any
    place: str


class Trace(TorchFunctionMode):
    """Inside ``with``, everything is computed as it would be without, and noted.

    model: its layers are noted, outermost last. at_backward: called when a loss goes back, before it does. loss: a
    module of the user's. full: what happens inside of modules is noted, too, and tensors are kept; else torch's own
    shortcuts inside of them stay as they are, which a mode or a hook would switch off, and nothing is kept that fills
    memory.
    """

    def __init__(
        self, model: nn.Module, at_backward: Callable[[Tensor], None] | None = None, *, loss: nn.Module | None = None,
        full: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.model, self.at_backward, self.loss, self.full = model, at_backward, loss, full
        self.calls: list[Call] = []
        self.layers: list[Layer] = []
        self.spread: list[Operation] = []  # outputs and targets of other shapes in one operation
        self.ends: dict[str, float] = {}  # of each sigmoid and tanh, the share of its results that lie at its ends
        self.cut_off: list[tuple[str, Tensor]] = []  # what a ReLU gave, and in which layer
        self.likenesses: list[Operation] = []  # cosine similarities
        self.differences: list[Operation] = []  # of what is trained and what is not, outside of modules
        self.softmaxes: list[Operation] = []
        self.dropped: list[tuple[str, float]] = []  # where dropout is called, and with which p
        self.thresholds: list[Operation] = []
        self._handles: list[Any] = []
        self._paths: dict[int, tuple[str, nn.Module]] = {}
        self._running: list[str] = []
        self._given: dict[str, list[tuple[Tensor | None, int]]] = {}
        self._depth = 0  # of modules that run, where they are left alone
        self._height = -1  # of the stack of modes, where this one was taken off it
        self._thread = threading.get_ident()
        self._is_over = False

    def __enter__(self) -> Trace:
        for path, module in self.model.named_modules():
            if self.full or module.training or any(p.requires_grad for p in module.parameters()):
                self._paths[id(module)] = path, module
        if not any(type(module).__name__ == "OptimizedModule" for _, module in self._paths.values()):
            self._watch_layers()
        self._move(onto=True)
        return self

    def _watch_layers(self) -> None:
        """By hooks of all modules, and none of the model's own: a copy that is made meanwhile takes none along."""
        self._handles.append(modules.register_module_forward_pre_hook(self._goes_in))
        self._handles.append(modules.register_module_forward_hook(self._comes_out, with_kwargs=True, always_call=True))

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        for handle in self._handles:
            handle.remove()
            modules._global_forward_hooks_with_kwargs.pop(handle.id, None)  # which torch forgets
        if self._height < 0:
            self._move(onto=False)

    def _move(self, onto: bool) -> None:
        """Onto the stack of modes, under all of the user's, who takes off the topmost one; or off it again."""
        above = []
        while (mode := _get_current_function_mode()) is not None and mode is not self:
            above.append(_pop_mode())
        if mode is self and not onto:
            _pop_mode()
        if mode is None and onto:
            _push_mode(self)
        for mode in reversed(above):
            _push_mode(mode)

    def _goes_in(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        with suppress(Exception):
            path = self._path_of(module)
            if path is not None and not self._is_over:
                given = next(tensors(args), None)
                self._running.append(path)
                self._given.setdefault(path, []).append((given, version_of(given)))
        if self._is_closed(module):
            self._depth += 1
            if (
                _get_current_function_mode() is self
            ):  # else one of the user's is above, or torch is just asking this one
                _pop_mode()
                self._height = _len_torch_function_stack()

    def _comes_out(self, module: nn.Module, args: Any, *given: Any) -> None:
        """given: what was given by name, and the output; the output alone, None, where an error goes through."""
        *kwargs, output = given
        if threading.get_ident() != self._thread:
            return
        with suppress(Exception):
            path = self._path_of(module)
            if path is not None and self._given.get(path):  # else it was not entered while it was watched
                self._note_layer(path, module, (args, kwargs), output)
        if self._is_closed(module) and self._depth:
            self._depth -= 1
            # Where a mode was put on the stack inside, and is still there, this one stays off it.
            if not self._depth and _len_torch_function_stack() == self._height:
                self._height = -1
                _push_mode(self)

    def _is_closed(self, module: nn.Module) -> bool:
        """Whether what happens inside is not noted: of all but losses."""
        return not (self.full or module is self.loss or isinstance(module, _Loss))

    def _path_of(self, module: nn.Module) -> str | None:
        return self._paths.get(id(module), (None, None))[0]

    def stop(self) -> None:
        """Notes nothing more, and lets go of what fills memory."""
        self._is_over = True
        for kept in (self.calls, self.spread, self.likenesses, self.differences, self.softmaxes, self.thresholds):
            kept.clear()
        self.cut_off.clear()
        self.layers = [layer._replace(input=None, output=None) for layer in self.layers]
        self._given.clear()
        self._running.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "backward" and self.at_backward is not None and args and isinstance(args[0], Tensor):
            self.at_backward(args[0])
        result = func(*args, **kwargs)
        if not self._is_over and not self._depth:
            with suppress(Exception):  # what cannot be noted is not seen; the pass goes on
                self._note(func, name, args, kwargs, result)
        return result

    def _note(self, function: Any, name: str, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        if (loss := LOSSES.get(function)) is not None:
            self._note_loss(loss, args, kwargs, result)
        elif name in _BINARY and isinstance(result, Tensor) and len(args) > 1:
            one, other = args[:2]
            is_outside = not self._running and isinstance(one, Tensor) and isinstance(other, Tensor)
            if is_outside and is_spread(one, other, result):
                self.spread.append(Operation(name, (one, other), result, line()))
            elif is_outside and "sub" in name and one.shape == other.shape:
                self.differences.append(Operation(name, (one, other), result, line()))
        elif name in ("softmax", "log_softmax") and isinstance(result, Tensor) and args:
            self.softmaxes.append(Operation(name, args, result, self._path() or line()))
        elif name == "dropout" and len(args) + len(kwargs) > 1:
            p, training = (kwargs.get(word, args[at] if len(args) > at else usual)
                           for at, word, usual in ((1, "p", 0.5), (2, "training", True)))  # fmt: skip
            self.dropped += [(self._path(), float(p))] if training else []
        elif name in ("relu", "relu_", "relu6") and isinstance(result, Tensor) and self._running:
            self.cut_off.append((self._path(), result))
        elif name in ("sigmoid", "tanh") and self._running:
            self.ends[f"{self._path()} ({name})".strip()] = at_ends(result, name)
        elif name == "cosine_similarity" and len(args) > 1:
            self.likenesses.append(Operation(name, args[:2], result, line()))
        elif name in _ASKED and args and not self._running:
            self.thresholds.append(Operation(name, (args, kwargs), result, line()))

    def _path(self) -> str:
        """The innermost layer that is running."""
        return self._running[-1] if self._running else ""

    def _note_loss(self, name: str, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        outputs = args[0] if args else kwargs.get("input")
        targets = args[1] if len(args) > 1 else kwargs.get("target")
        reduction = kwargs.get("reduction", "mean")
        reduction = {0: "none", 1: "mean", 2: "sum"}.get(reduction, reduction)
        if isinstance(outputs, Tensor) and isinstance(targets, Tensor) and isinstance(result, Tensor):
            weight = args[2] if len(args) > 2 else kwargs.get("weight")
            ignored = kwargs.get("ignore_index", args[4] if len(args) > 4 else -100)
            is_weighted = name in ("bce", "bce_with_logits") and weight is not None
            self.calls.append(Call(name, outputs, targets, str(reduction), result, line(), ignored, is_weighted))

    def _note_layer(self, path: str, module: nn.Module, arguments: Any, output: Any) -> None:
        given, version = self._given[path].pop()
        self._running.pop()
        if output is None or self._is_over:  # an error went through it
            return
        if given is None:  # all were given by name
            given = next(tensors(arguments), None)
            version = version_of(given)
        made = list(islice(tensors(output), 64))
        shape, ids = tuple(given.shape) if given is not None else (), frozenset(map(id, made))
        layer = Layer(path, module, module.training, shape, ids)
        if not self.full:
            self.layers.append(layer)
            return
        if isinstance(module, nn.RNN) and isinstance(output, tuple) and module.nonlinearity == "tanh":
            self.ends[f"{path} (RNN)"] = at_ends(next(iter(made)), "tanh")
        after = version_of(made[0]) if made else 0
        layer = layer._replace(input=given, output=output, input_version=version, output_version=after)
        self.layers.append(layer)


def version_of(tensor: Tensor | None) -> int:
    """How often its memory was changed; 0 of what does not count it."""
    return tensor._version if tensor is not None and not tensor.is_inference() else 0


def is_spread(one: Tensor, other: Tensor, result: Tensor) -> bool:
    """Whether outputs (n,) and targets (n, 1), or the other way round, made (n, n): each with each.

    That is: both were repeated along a dimension that the other one has, of the same size. What compares outputs with
    one another, or targets, means that; here only one of both is trained.
    """
    trained = [part for part in (one, other) if part.requires_grad]
    if len(trained) != 1 or trained[0].is_leaf or one.dim() == other.dim():
        return False
    dims = result.dim()
    shapes = [(1,) * (dims - part.dim()) + tuple(part.shape) for part in (one, other)]
    only = [{shape[at] for at in range(dims) if shape[at] > 1 and beside[at] == 1}
            for shape, beside in (shapes, shapes[::-1])]  # fmt: skip
    return bool(only[0] & only[1])


def at_ends(result: Tensor, name: str) -> float:
    """The share of the results of a sigmoid or a tanh that lie within 0.01 of its ends."""
    values = result.detach()
    low = 0.0 if name == "sigmoid" else -1.0
    return ((values < low + 0.01) | (values > 0.99)).float().mean().item() if values.numel() else 0.0


def tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors in a structure, in order; no code of a class of the user's is run for it."""
    if isinstance(value, Tensor):
        yield value
    elif depth > 8:
        return
    elif isinstance(value, dict | UserDict):
        for part in dict.values(value if isinstance(value, dict) else value.data):
            yield from tensors(part, depth + 1)
    elif isinstance(value, list | tuple):
        for part in list.__iter__(value) if isinstance(value, list) else tuple.__iter__(value):
            yield from tensors(part, depth + 1)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors(getattr(value, name, None), depth + 1)


def place() -> str:
    """File and line of the user's call of epochal: the innermost frame outside of it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_users(frame):
        frame = frame.f_back
    return _told(frame)


def line() -> str:
    """File and line where the user calls the operation that is being made; empty where epochal calls it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    while frame is not None and not _is_users(frame):
        if frame.f_code.co_filename.startswith(_OURS[0]):
            return ""
        frame = frame.f_back
    return _told(frame)


def _is_users(frame: FrameType) -> bool:
    name = frame.f_code.co_filename  # "<ipython-input-3-...>" in a notebook
    return not name.startswith((*_OURS, "<frozen", "<string>"))


def _told(frame: FrameType | None) -> str:
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
