"""A tiny configuration of any causal type, worked out from the fields its configuration has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.support.architectures.settings import Own, settings

#: Where the text model of an image or audio model stands.
_TEXT_PARTS = ("text_config", "text_model_config")
_ONE_ID = ("_token_id", "_token_index")
_NO_DROPOUT = ("dropout", "pdrop", "_drop", "layerdrop")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What differs between tiny models for tests of passes, and those that real commands run on.

    Attributes:
        vocabulary: Number of token ids.
        context: Longest sequence.
        special: Ids of special tokens, by the field that has them.
    """

    vocabulary: int = 300
    context: int = 256
    special: Mapping[str, int | None] = dataclasses.field(default_factory=dict)


def configuration(name: str, sizes: Sizes | None = None, **over: Any) -> PreTrainedConfig:
    """A tiny configuration: 64 wide, three to six blocks, every kind of block that the defaults have.

    Args:
        name: A causal type, or ``type@variant``.
        sizes: Vocabulary and context.
        over: Values over all others.

    Raises:
        Exception: Whatever the type's configuration raises about these values.
    """
    sizes = sizes or Sizes()
    kind = name.partition("@")[0]
    cls = CONFIG_MAPPING[kind]
    own = settings().own(name)
    values = {
        field: _filled(value, sizes) for field, value in {**_small(cls, own, sizes), **own.values, **over}.items()
    }
    for part in _TEXT_PARTS:
        inner = getattr((cls.sub_configs or {}).get(part), "model_type", None)
        if part not in values and inner in CONFIG_MAPPING and inner != kind:
            values[part] = configuration(inner, sizes).to_dict()
    config = cls(**values)
    kinds = _every_kind(cls, config, {*own.values, *own.derived, *over})
    return cls(**{**values, **kinds}) if kinds else config


def _small(cls: type[PreTrainedConfig], own: Own, sizes: Sizes) -> dict[str, Any]:
    """The small values of the fields that a configuration has."""
    known, values = settings(), {}
    for field in dataclasses.fields(cls):
        name, default = field.name, field.default
        if name in own.derived:
            continue
        if name in known.small:
            if default is not None or name in known.small_though_null:
                values[name] = known.small[name]
        elif name in sizes.special:
            values[name] = sizes.special[name]
        elif isinstance(default, bool) or not isinstance(default, (int, float)):
            continue
        elif any(part in name for part in _NO_DROPOUT):
            values[name] = 0.0
        elif name.endswith(_ONE_ID) and default >= sizes.vocabulary:
            values[name] = 0 if name.startswith("pad") else sizes.vocabulary - 1
    return values


def _filled(value: Any, sizes: Sizes) -> Any:
    """A value of the settings with its words replaced, and the tiny configurations in it made."""
    if isinstance(value, list):
        return [_filled(item, sizes) for item in value]
    if isinstance(value, dict):
        items = {key: _filled(item, sizes) for key, item in value.items()}
        return configuration(items.pop("tiny"), sizes, **items).to_dict() if "tiny" in items else items
    words = {"$vocabulary": sizes.vocabulary, "$last": sizes.vocabulary - 1, "$context": sizes.context}
    return words.get(value, value) if isinstance(value, str) else value


def _every_kind(cls: type[PreTrainedConfig], tiny: PreTrainedConfig, fixed: set[str]) -> dict[str, list[str]]:
    """The kinds of blocks where the tiny model would lack some that the defaults have."""
    try:
        full = cls()
    except Exception:  # noqa: BLE001 - defaults that a type itself refuses have no kinds
        return {}
    known, depth, found = settings(), getattr(tiny, "num_hidden_layers", None), {}
    for name in (*known.kinds, *known.kinds_first_once):
        wanted, has = _words(full, name), _words(tiny, name)
        if depth is None or name in fixed or not has or set(has) == set(wanted):
            continue
        if len(wanted) > depth:
            raise ValueError(f"{cls.model_type}: {name} has {len(wanted)} kinds, more than {depth} blocks; set it")
        if name in known.kinds_first_once:
            found[name] = wanted[:-1] + wanted[-1:] * (depth - len(wanted) + 1)
        else:
            found[name] = [wanted[block % len(wanted)] for block in range(depth)]
    return found


def _words(config: PreTrainedConfig, name: str) -> list[str]:
    """Distinct entries of a list of words in a configuration, in order; none where it has no such list."""
    value = getattr(config, name, None)
    words: Iterable[Any] = value if isinstance(value, (list, tuple)) else ()
    return list(dict.fromkeys(word for word in words if isinstance(word, str)))
