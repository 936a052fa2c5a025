"""torch's compiler, called with as little around it as can be: all that is private of it stands here.

Between a call of a function that ``torch.compile`` gave and its kernels lie its own wrappers, which cost as much as a
small network. So a graph's guards are evaluated by the interpreter's hook alone, and what the graph's code is handed by
it goes to the kernels at once. Where the installed torch has other insides, its usual wrappers are called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from epochal.runtime.attributes import Attributes

SHAPES = 8  # of what is given that graphs are made for: each takes seconds
TRIES = 3  # to repeat a call: to find out whether it may be costs more than its guards
TIMES = 4  # that one is made for the same shapes: beyond, something of the model changes with every update
MISSED = object()  # no graph is there for what was given
_SKIPS_HOOKS = "skip_nnmodule_hook_guards"  # hooks that were added later would not be seen
_TRACES_BACKWARD = "trace_autograd_ops"  # an option of dynamo's: a backward pass may be part of a graph


def can_trace_backward() -> bool:
    """Whether the installed torch can compile forward, loss and backward into one graph."""
    import torch._dynamo.config as dynamo

    return hasattr(dynamo, _TRACES_BACKWARD)


class Trust:
    """Whether nothing but epochal's own code and what it has compiled runs: then no guard can have come to fail.

    Guards are what torch looks at before each call of a graph: everything of the model and of the program around it
    that decided what was compiled. is_given: by a run that nobody watches, until it ends. ``end`` is called where
    somebody else's code ran.
    """

    def __init__(self) -> None:
        self.is_given, self.age = False, 0

    def end(self) -> None:
        self.age += 1

    def withdraw(self) -> None:
        self.is_given = False
        self.end()


class Tally:
    """How often graphs were made for which shapes, over all goes of a run: a resumed one makes again what the run
    before it had made, and nothing else, for its bits are not those of eager torch.
    """

    def __init__(self) -> None:
        self._times: dict[str, int] = {}
        self._lost: set[str] = set()  # with the process before this one
        self._again: set[str] = set()  # that were made again
        self.has_fitted = False  # a graph, since the last one was made

    def allows(self, shapes: str) -> bool:
        """Whether one more may be made; it counts."""
        is_again, has_fitted, self.has_fitted = shapes in self._lost, self.has_fitted, False
        if is_again:
            self._lost.discard(shapes)
            self._again.add(shapes)
            return True
        if shapes not in self._times and len(self._times) >= SHAPES:
            return False
        # If what was made again has not fitted once, neither would the one that was lost: it had counted then.
        uncounted = shapes in self._again and not has_fitted
        self._again.discard(shapes)
        self._times[shapes] = self._times.get(shapes, 0) + 1 + uncounted
        return self._times[shapes] <= TIMES

    def state_dict(self) -> dict[str, int]:
        return dict(self._times)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._times, self._lost = dict(state), set(state)


class Called(NamedTuple):
    """Kernels, what they took, and what they made."""

    kernels: Callable[[list[Any]], Any]
    taken: Sequence[Any]
    made: Sequence[Any]


class Graph:
    """A function as one graph of kernels, for each kind of arguments.

    Calling it gives what the function gives, or MISSED if no graph is there whose guards hold; ``compile`` makes one.
    What the function does to tensors it was given happens to them; it must not change anything else.
    """

    def __init__(
        self, function: Callable[..., Any], trust: Trust, modules: Sequence[nn.Module], *, captures: bool = False
    ):
        def traced(*given: Any, **named: Any) -> Any:
            if not torch.compiler.is_compiling():  # no guards held, so the interpreter runs this very line
                return MISSED
            return function(*given, **named)

        # torch keeps graphs by the code that they were made of: one of its own, so that they are not taken for others'
        traced.__code__ = traced.__code__.replace()
        self._traced, self._trust, self._captures, self._modules = traced, trust, captures, modules
        self._before: Attributes | None = None  # the last call
        self._tries = TRIES
        self._compiled = torch.compile(traced, fullgraph=True, dynamic=False, backend=_lowered)
        self._set_hook = _hook()
        self._calls: list[Called] = []  # the last one; the graphs know it, and not this object, which holds them
        self._repeats: dict[Any, Repeat | Captured] = {}
        self._age = 0  # of the trust in which they may be repeated

    def __call__(self, *given: Any, **named: Any) -> Any:
        self._calls.clear()
        if self._set_hook is None:
            return MISSED
        self._before = Attributes(self._modules) if self._trust.is_given and self._tries else None
        before = self._set_hook(False)  # graphs that are there are run; nothing is compiled
        try:
            return self._traced(*given, **named)
        finally:
            self._set_hook(before)
            if not self._trust.is_given:  # nobody will ask for it, and it holds a batch
                self._calls.clear()

    def repeat(self, key: Any) -> Repeat | Captured | None:
        """The call that was kept by this key, if nothing can have changed since."""
        if self._age != self._trust.age:
            self._repeats.clear()
            self._age = self._trust.age
        return self._repeats.get(key)

    def keep(self, key: Any, given: Sequence[Tensor], gave: Any, lasting: Sequence[Tensor] = ()) -> None:
        """After a call: keeps it, to be repeated with other tensors in the place of ``given``. gave: what it gave.
        lasting: what it is given each time, beside what the modules have.
        """
        if not self._trust.is_given:
            return
        made, before, self._before = None, self._before, None
        if before is not None and len(self._calls) == 1 and before == (now := Attributes(self._modules)):
            known = {id(one) for one in (*given, *lasting, *now.objects)}
            if all(id(one) in known for one in self._calls[0].taken):  # else something else changes what it computes
                made = Repeat.of(self._calls[0], given, gave)
        self._calls.clear()
        self._tries = TRIES if made is not None else max(0, self._tries - 1)
        if made is None:  # more than kernels may have run
            self._trust.end()
        elif self.repeat(key) is None:
            # What comes seldom (the ragged last batch) is not worth a capture: the first that comes is the usual one.
            captures = self._captures and not self._repeats
            self._repeats[key] = Captured(made, given) if captures else made

    def compile(self, *given: Any, **named: Any) -> Any:
        """As a call, with a new graph. Raises whatever torch raises if there can be none."""
        import torch._dynamo.config as dynamo
        import torch._functorch.config as functorch

        self._trust.end()
        with ExitStack() as settings:
            settings.enter_context(dynamo.patch({_TRACES_BACKWARD: True, "recompile_limit": 64, _SKIPS_HOOKS: False}))
            settings.enter_context(functorch.patch(enable_autograd_cache=False))  # it hides what is compiled inside
            settings.enter_context(_quiet())  # what cannot be compiled is told in a line
            settings.callback(_CALLS.pop)
            _CALLS.append(self._calls)
            gave = self._compiled(*given, **named)
            self._calls.clear()
            return gave


# Where the graphs that are being made tell of their calls. torch keeps a backend for ever: none may know a model.
_CALLS: list[list[Called]] = []


def _lowered(graph: Any, examples: Any) -> Callable[..., Any]:
    """The backend: torch's inductor; and of what it gives the kernels alone, where nothing is done around them."""
    from torch._guards import TracingContext
    from torch._inductor import compile_fx, config

    inner: list[Any] = []
    calls = _CALLS[-1]

    def compiled(module: Any, inputs: Any, **options: Any) -> Any:
        made = compile_fx.compile_fx_inner(module, inputs, **options)
        is_bare = options.get("is_inference") is True and _has_nothing_around(TracingContext.get().fw_metadata)
        inner.append((made, len(inputs), is_bare))
        return made

    with config.patch(cpp_wrapper=all(one.device.type == "cpu" for one in examples if isinstance(one, Tensor))):
        whole: Any = compile_fx.compile_fx(graph, examples, inner_compile=compiled)
    made, count, is_bare = inner[0] if len(inner) == 1 else (None, 0, False)
    kernels = getattr(made, "current_callable", None)
    if kernels is None or not is_bare or count != len(examples):
        return whole

    def call(*given: Any) -> Any:
        gave = _without_gradients(kernels, list(given))
        calls.append(Called(kernels, given, gave))
        return gave

    return call


class Repeat:
    """A call of a graph once more, of which nothing has changed but some tensors: no guard is evaluated."""

    def __init__(self, kernels: Callable, taken: list[Any], places: list[int], gives: Callable[[Sequence[Any]], Any]):
        self._kernels, self._taken, self._places, self._gives = kernels, taken, places, gives

    def __call__(self, given: Sequence[Tensor]) -> Any:
        """given: of the shapes and types that were compiled for."""
        taken = self._taken.copy()  # the kernels empty it
        for place, tensor in zip(self._places, given):
            taken[place] = tensor
        return self._gives(_without_gradients(self._kernels, taken))

    @classmethod
    def of(cls, last: Called, given: Sequence[Tensor], gave: Any) -> Repeat | None:
        """None where what a call gave is not all that its kernels gave: then something was kept on the way."""
        kernels, taken, made = last
        places = [place for one in given for place, tensor in enumerate(taken) if tensor is one]
        used: list[int | None] = []
        gives = _giver(gave, made, used)
        is_whole = set(used) == set(range(len(made))) and len(places) == len(given)
        return cls(kernels, list(taken), places, gives) if is_whole else None


class Captured:
    """A call that a CUDA device repeats by itself (a CUDA graph): the host launches all of its kernels at once.

    Inputs are copied to where they were when it was recorded, and what it makes is copied from where it lies, for the
    next time writes there again. Recording runs nothing; torch registers its generators with it, so that each time
    draws anew.
    """

    def __init__(self, repeat: Repeat, given: Sequence[Tensor]):
        self._given = [tensor.clone() for tensor in given]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._gave = repeat(self._given)

    def __call__(self, given: Sequence[Tensor]) -> Any:
        torch._foreach_copy_(self._given, list(given))
        self._graph.replay()
        return tree_map(lambda one: one.clone() if isinstance(one, Tensor) else one, self._gave)


def _giver(gave: Any, made: Sequence[Any], used: list[int | None]) -> Callable[[Sequence[Any]], Any]:
    """Puts what kernels made together as ``gave`` was; used: the places of it that are taken, None is amiss."""
    if isinstance(gave, Tensor):
        place = next((number for number, one in enumerate(made) if one is gave), None)
        used.append(place)
        return itemgetter(place)
    if type(gave) in (tuple, list):
        parts, kind = [_giver(part, made, used) for part in gave], type(gave)
        return lambda now: kind(part(now) for part in parts)
    if type(gave) is dict:
        named = {key: _giver(part, made, used) for key, part in gave.items()}
        return lambda now: {key: part(now) for key, part in named.items()}
    if not (gave is None or isinstance(gave, int | float | str)):
        used.append(None)
    return lambda _: gave


def _without_gradients(kernels: Callable[[list[Any]], Any], given: list[Any]) -> Any:
    was_enabled = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        return kernels(given)
    finally:
        torch._C._set_grad_enabled(was_enabled)


class Forward:
    """A model's forward pass, compiled into one graph; or else in parts, as torch can; or else the model itself."""

    def __init__(self, model: nn.Module, trust: Trust):
        self._model, self._graph, self._trust = model, Graph(model, trust, [model]), trust
        self._tally = Tally()
        self._call: Callable[..., Any] | None = None  # what is called instead of the graph, where there is none
        self._notes: list[str] = []

    def __call__(self, *given: Any, **named: Any) -> Any:
        if self._call is None:
            return self._by_graph(given, named)
        self._trust.end()
        if self._call is self._model:
            return self._model(*given, **named)
        try:
            with _quiet():
                return self._call(*given, **named)
        except Exception as error:
            outputs = self._model(*given, **named)  # raises what is wrong with the model or the batch
            self._call = self._model
            self._notes.append(f"compile: the model is not compiled: {reason(error)}")
            return outputs

    def gives_up(self, error: Exception) -> bool:
        """Whether an error is the compiler's, as from a backward pass, which it compiles when it is needed: then the
        model is called as it is from here on.
        """
        is_its_own = type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))
        if self._call is self._model or not is_its_own:
            return False
        self._call = self._model
        self._notes.append(f"compile: the model is not compiled: {reason(error)}")
        return True

    def state_dict(self) -> dict[str, Any]:
        return self._tally.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tally.load_state_dict(state)

    def take_notes(self) -> list[str]:
        """What there is to say since the last time."""
        notes, self._notes = self._notes, []
        return notes

    def _by_graph(self, given: tuple, named: dict[str, Any]) -> Any:
        is_plain = not named and not torch.is_grad_enabled() and all(type(one) is Tensor for one in given)
        key = tuple(map(_layout, given)) if is_plain and self._trust.is_given else None
        if key is not None and (repeat := self._graph.repeat(key)) is not None:
            return repeat(given)
        if (outputs := self._graph(*given, **named)) is not MISSED:
            self._tally.has_fitted = True
            if key is not None:
                self._graph.keep(key, given, outputs)
            else:
                self._trust.end()
            return outputs
        self._trust.end()
        if not self._tally.allows(str(tree_map(_shape, (given, named)))):
            return self._model(*given, **named)
        try:
            return self._graph.compile(*given, **named)
        except Exception:
            self._call = torch.compile(self._model)
            return self(*given, **named)


def _layout(one: Tensor) -> tuple[Any, ...]:
    return one.shape, one.stride(), one.dtype, one.device


def _shape(one: Any) -> str:
    return f"{one.dtype} {tuple(one.shape)}" if isinstance(one, Tensor) else type(one).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._inductor", "torch._subclasses")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)


def reason(error: Exception) -> str:
    """What torch says of why it cannot compile, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if not line.startswith("backend=")), type(error).__name__)
    return told[:160].rstrip(".")


def _hook() -> Callable[[Any], Any] | None:
    try:
        from torch._C._dynamo.eval_frame import set_eval_frame
    except ImportError:
        return None
    return set_eval_frame


def _has_nothing_around(made: Any) -> bool:
    """Whether what is compiled takes its inputs and gives its outputs as they are: no views, no copies, no tokens."""
    from torch._functorch._aot_autograd.schemas import OutputType

    plain = all(output.output_type is OutputType.non_alias for output in made.output_info)
    return plain and made.num_mutated_inp_runtime_indices == 0 and not made.tokens
