"""What a model's configuration claims, whatever its type calls it.

A claim is no measurement: a configuration may name no number of blocks, or count something else under that name. What
the loaded model shows takes its place where it is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

#: The context of a model whose configuration names none: recurrent models, ALiBi, windows of local attention.
UNLIMITED = 1 << 30

_DEPTH = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_blocks", "n_blocks", "decoder_layers")
_WIDTH = ("hidden_size", "d_model", "n_embd", "embedding_dim", "dim")
_VOCABULARY = ("vocab_size", "n_vocab")
_CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "context_length",
    "n_ctx",
)
#: Entries that describe the file or the library rather than the model.
_VOLATILE = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "use_cache",
)


def claimed_depth(config: Any) -> int | None:
    """The number of blocks that a configuration claims; None where it names none.

    Args:
        config: Of a language model, or of a wrapper around one.
    """
    # What a type declares says more than what it derives: one counts attentions, of which its blocks have two each.
    text = config.get_text_config()
    declared = {*getattr(type(text), "__dataclass_fields__", ()), *getattr(type(text), "attribute_map", {})}
    names = sorted(_DEPTH, key=lambda name: name not in declared)
    return next(_numbers(text, names), None)


def claimed_width(config: Any) -> int | None:
    """The width of the residual stream that a configuration claims; None where it names none.

    Args:
        config: As of :func:`claimed_depth`.
    """
    return next(_numbers(config.get_text_config(), _WIDTH), None)


def vocabulary(config: Any) -> int | None:
    """Number of token ids; None where a configuration does not say.

    Args:
        config: As of :func:`claimed_depth`.
    """
    return next(_numbers(config.get_text_config(), _VOCABULARY), None)


def context_length(config: Any) -> int:
    """Longest sequence that the position encoding was made for; :data:`UNLIMITED` where nothing says so.

    Args:
        config: As of :func:`claimed_depth`.
    """
    return next(_numbers(config.get_text_config(), _CONTEXT), UNLIMITED)


def identity(config: Any) -> dict[str, Any]:
    """The entries that make a model what it is, as JSON values, for hashing.

    Args:
        config: Any configuration.
    """
    return {k: _spelt(v) for k, v in config.to_dict().items() if k not in _VOLATILE}


def _numbers(config: Any, names: Iterable[str]) -> Iterator[int]:
    """The positive whole numbers that a configuration has under these names, in their order."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield value


def _spelt(value: Any) -> Any:
    """A value with its infinities as words, which JSON has no numbers for; all else is as it was."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _spelt(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelt(item) for item in value]
    return value
