"""Parts of a checkpoint that read no text, which a causal language model of its text part is complete without.

A checkpoint for images and text may hold more than the causal class of its type has: a vision tower, a projector. Which
of its tensors these are is asked of the checkpoint's own architecture, built without memory for its weights: a name
that this does not know either, or knows in its text part, is an error in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

#: What is read besides text, by the word that names a configuration inside another.
_KINDS = {"vision": "images", "image": "images", "video": "videos", "audio": "sound", "speech": "speech"}

#: What was left out of the models of this process.
_LEFT_OUT: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def leave_out(model: nn.Module, words: str) -> None:
    """Remember what a model was loaded without, as long as it lives.

    Args:
        model: As loaded.
        words: What :func:`beside_text` found, in words.
    """
    _LEFT_OUT[model] = words


def left_out(model: nn.Module) -> str | None:
    """What a model was loaded without, in words; None for nothing.

    Args:
        model: As loaded.
    """
    return _LEFT_OUT.get(model)


@dataclass(frozen=True)
class Unread:
    """Tensors of a checkpoint that read no text.

    Attributes:
        names: As the checkpoint has them.
        kinds: What they read instead, in words.
    """

    names: frozenset[str]
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        """In words, such as ``554 tensors for images``."""
        number = f"{len(self.names)} tensors" if len(self.names) > 1 else "1 tensor"
        return f"{number} for {' and '.join(self.kinds)}"


def beside_text(config: Any, unexpected: Collection[str]) -> Unread | None:
    """Tensors that a causal model does not know because they are whole parts of its checkpoint which read no text.

    Args:
        config: transformers' configuration of the checkpoint.
        unexpected: Names of the tensors in the checkpoint.

    Returns:
        They, without those that nobody knows; None where there are none, or one is in the text part, or a part is not
        whole.
    """
    import transformers

    kinds = _other_kinds(config)
    names = getattr(config, "architectures", None) or [""]
    whole = getattr(transformers, names[0], None)
    if not unexpected or not kinds or not isinstance(whole, type):
        return None
    try:
        _, everything, _ = _built(whole, config, ())
        model, lacking, unknown = _built(whole, config, unexpected)
    except Exception:  # noqa: BLE001 - whatever prevents it: then nobody knows these tensors
        return None
    known = frozenset(unexpected) - unknown
    if not known or not unknown <= set(unexpected):  # an architecture may report names under which it looked for them
        return None
    branches = _branches(model, config, everything - lacking)
    # A part with a misspelt name is not whole; then it is that name that is to be refused.
    if not branches or (not unknown and any(_within(name, branches) for name in lacking)):
        return None
    found = {
        kinds[type(module.config)]
        for path, module in model.named_modules()
        if _within(path, branches) and type(getattr(module, "config", None)) in kinds
    }
    return Unread(known, tuple(sorted(found))) if found else None


def _other_kinds(config: Any) -> dict[type, str]:
    """What the configurations inside one are for, by their class; without the one for text."""
    text = config.get_text_config()
    inner = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}}
    plain = {name.removesuffix("_config"): each for name, each in inner.items() if each is not None}
    return {type(each): _KINDS.get(name, name) for name, each in plain.items() if not isinstance(each, type(text))}


def _built(whole: type, config: Any, names: Iterable[str]) -> tuple[Any, set[str], set[str]]:
    """An architecture that is given these tensors of a checkpoint, with the names that it lacks and does not know."""
    own = deepcopy(config)
    # How tensors are packed says nothing about which there are, and may need a device.
    own.__dict__.pop("quantization_config", None)
    given = {name: torch.empty(0, device="meta") for name in names}
    model, found = whole.from_pretrained(  # type: ignore[attr-defined]
        None,
        config=own,
        state_dict=given,
        device_map={"": "meta"},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return model, set(found["missing_keys"]), set(found["unexpected_keys"])


def _branches(model: Any, config: Any, held: Collection[str]) -> tuple[str, ...] | None:
    """The parts beside the text model that hold tensors; None where one is inside it or is the head."""
    kind = type(config.get_text_config())
    texts = [path for path, module in model.named_modules() if path and type(getattr(module, "config", None)) is kind]
    head = model.get_output_embeddings()
    heads = [path for path, module in model.named_modules() if module is head and path]
    if not texts or any(_within(name, (*texts, *heads)) for name in held):
        return None
    text = min(texts, key=len).split(".")
    found = set()
    for name in held:
        words = name.split(".")
        common = next(i for i, word in enumerate(words) if i >= len(text) or word != text[i])
        found.add(".".join(words[: common + 1]))
    return tuple(sorted(found))


def _within(name: str, paths: Iterable[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)
