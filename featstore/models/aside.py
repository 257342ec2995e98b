"""Passes of our own through a model that is in use: what this project has hooked into it stands aside for them.

While states are injected into a model, its passes belong to whoever injects. A test of the model, or a prompt that is
read for its states, must neither meet those hooks nor be counted by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_ROOM = __name__.rpartition(".")[0]


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Take the hooks of this project off a model, and put them back in their order.

    Hooks of others stay: they may be a part of the model.

    Args:
        model: A causal language model.
    """
    held = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):  # noqa: SLF001 - torch lists them nowhere else
            ours = [number for number, hook in hooks.items() if _is_ours(hook)]
            if ours:
                held.append((hooks, dict(hooks)))
                for number in ours:
                    del hooks[number]
    try:
        yield
    finally:
        for hooks, before in held:
            added = {number: hook for number, hook in hooks.items() if number not in before}
            # The handles of the hooks know this very dictionary.
            hooks.clear()
            hooks.update({**before, **added})


def _is_ours(hook: Any) -> bool:
    place = str(getattr(hook, "__module__", ""))
    return place == _ROOM or place.startswith(f"{_ROOM}.")
