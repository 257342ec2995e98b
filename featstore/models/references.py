"""Model references and layer lists as typed, parsed into values.

Every ``parse_*`` function turns bad input into a :class:`~featstore.errors.SpecError` that quotes the value and says
what would be right. Nothing here touches the disk or a model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from featstore.errors import LayerRangeError, SpecError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
#: Characters of a name: with two of them a store names the directory of a pair, and 255 are what most disks allow.
_LONGEST = 100
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)%\Z")

DEFAULT_MODELS = ("llama=meta-llama/Llama-3.1-8B", "mistral=mistralai/Mistral-7B-v0.3")
DEFAULT_LAYERS = "0,8,16,24,32"


@dataclass(frozen=True)
class Allowed:
    """What the user allows of files that somebody else may have made.

    Attributes:
        references: Models that such a file names are read and fetched (``--yes``).
        pickles: Weights are unpickled where a model has no others (``--allow-pickle-weights``).
    """

    references: bool = False
    pickles: bool = False


#: Without any of the options.
NOTHING = Allowed()


@dataclass(frozen=True)
class ModelSpec:
    """A model's short name in the store and where it comes from.

    Attributes:
        name: Used in paths and keys; letters, digits, dot, dash, underscore.
        ref: Hub id, local directory or GGUF file, without the revision.
        revision: Hub revision, or None for the default branch.
        allowed: What may be done with what its files say and hold; does not make it another model.
    """

    name: str
    ref: str
    revision: str | None = None
    allowed: Allowed = field(default=NOTHING, compare=False)


def expanded(ref: str) -> Path:
    """A reference as a path, with ``~`` resolved where there is such a user; the disk is not touched.

    Args:
        ref: Of a model.
    """
    try:
        return Path(ref).expanduser()
    except RuntimeError:  # nobody has this name
        return Path(ref)


def is_name(text: str) -> bool:
    """Whether a model can have this name: it stands in paths and keys.

    Args:
        text: Anything.
    """
    return bool(_NAME.match(text)) and "__" not in text and len(text) <= _LONGEST


def parse_model(text: str, allowed: Allowed = NOTHING) -> ModelSpec:
    """Parse ``NAME=REF[@REVISION]``.

    Args:
        text: As typed after ``--model``.
        allowed: Becomes part of it.

    Raises:
        SpecError: The form is wrong or the name cannot be used in a path.
    """
    name, equals, ref = text.partition("=")
    if not equals or not ref:
        raise SpecError(f"model {text!r}: write NAME=REF, for example llama=meta-llama/Llama-3.1-8B")
    if not _NAME.match(name) or "__" in name:
        raise SpecError(
            f"model name {name!r}: use letters, digits, '.', '-' and single '_', starting with a letter or digit"
        )
    if len(name) > _LONGEST:
        raise SpecError(f"model name {name[:_LONGEST]!r}...: use at most {_LONGEST} characters")
    # A revision only makes sense for a hub id; a local path may contain '@'.
    if "@" in ref and not ref.startswith((".", "/", "~")):
        ref, _, revision = ref.rpartition("@")
        if not ref or not revision:
            raise SpecError(f"model {text!r}: write NAME=REF@REVISION, or leave the '@' out")
        return ModelSpec(name, ref, revision, allowed)
    return ModelSpec(name, ref, allowed=allowed)


def parse_models(texts: Sequence[str], allowed: Allowed = NOTHING) -> tuple[ModelSpec, ...]:
    """Parse all ``--model`` values and refuse a name given twice.

    Args:
        texts: As typed.
        allowed: Becomes part of each.

    Raises:
        SpecError: As :func:`parse_model`, or a repeated name.
    """
    specs = tuple(parse_model(text, allowed) for text in texts)
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise SpecError(f"model name {name!r} is given twice; give each --model its own NAME")
    return specs


def parse_layers(texts: Sequence[str], depths: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Resolve ``--layers`` values to sorted layer numbers for every model.

    Layer k is the residual stream after k blocks: 0 the embedding output, L the stream before the final norm.

    Args:
        texts: Each ``K,K,...`` (all models) or ``NAME=K,K,...`` (one model); K is a number or a depth in percent.
        depths: Number of blocks L of every model, in store order.

    Raises:
        LayerRangeError: A layer outside 0..L; the message proposes L or percentages.
        SpecError: Anything else that does not parse, or a model that is not there.
    """
    common: str | None = None
    own: dict[str, str] = {}
    for text in texts:
        name, equals, items = text.partition("=")
        if not equals:
            common = text
        elif name in depths:
            own[name] = items
        else:
            raise SpecError(f"--layers {text!r} names model {name!r}; the models are {', '.join(depths)}")
    result = {}
    for name, depth in depths.items():
        chosen = own.get(name, common)
        if chosen is None:
            raise SpecError(f"no --layers for model {name!r}; add --layers {name}=0,50%,100%")
        result[name] = tuple(sorted({_layer(item.strip(), name, depth) for item in chosen.split(",")}))
    return result


def _layer(item: str, name: str, depth: int) -> int:
    percent = _PERCENT.match(item)
    if percent:
        share = float(percent[1])
        if share > 100:
            raise LayerRangeError(f"layer {item!r}: a depth in percent lies between 0% and 100%")
        # Half up, not to even: 25% and 75% of one depth then round the same way.
        return int(share * depth / 100 + 0.5)
    if not (item.isdecimal() and len(item) < 10):
        raise SpecError(f"layer {item!r}: write numbers such as 0,8,16 or depths such as 0%,50%,100%")
    layer = int(item)
    if layer > depth:
        raise LayerRangeError(
            f"layer {layer} is outside 0..{depth} of model {name!r} ({depth} blocks); "
            f"use {depth} for the last one, or depths that fit every model: --layers 0%,25%,50%,75%,100%"
        )
    return layer
