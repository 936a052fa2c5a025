"""What torch's engines hang on a module: noted, so that it can be taken off again. FSDP2 has no way back of its own."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import nn
from torch.distributed._composable_state import _module_state_mapping


class Traces:
    """Made before the modules are changed; :meth:`note` after it. What is added later, by anybody else, stays.

    >>> module = nn.Linear(2, 1)
    >>> traces = Traces([module])
    >>> handle = module.register_forward_hook(print)
    >>> traces.note()
    >>> traces.remove()
    >>> len(module._forward_hooks)
    0
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self._before = [(part, type(part), _entries(part)) for module in modules for part in module.modules()]
        self._added: list[tuple[nn.Module, type, set[tuple[str, Hashable]]]] = []

    def note(self) -> None:
        self._added = [(part, kind, _entries(part) - known) for part, kind, known in self._before]

    def remove(self) -> None:
        """Gives each module its class back, and takes off the attributes and hooks that were added."""
        for part, kind, added in self._added:
            part.__class__ = kind
            _module_state_mapping.pop(part, None)  # torch's own list of them
            for name, key in added:
                if key is None:
                    vars(part).pop(name, None)
                else:
                    vars(part).get(name, {}).pop(key, None)


def _entries(part: nn.Module) -> set[tuple[str, Hashable]]:
    """The attributes of a module, and what stands in those that are tables, as the hooks."""
    attributes = vars(part).items()
    within = {(name, key) for name, table in attributes if isinstance(table, dict) for key in table}
    return within | {(name, None) for name, _ in attributes}
