"""Tiny random models of every causal type of the installed transformers, and those that cannot be built."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support.architectures.configuration import Sizes, configuration
from tests.support.architectures.settings import described, settings

#: Standard deviation of what is added to every parameter: gates and residual scales that start at zero act with it.
NOISE = 0.08


class NotBuiltError(Exception):
    """A type that cannot be built; the message is the reason.

    Attributes:
        looked_at: Whether the settings know of it. If not, nobody looked at this type yet.
    """

    def __init__(self, message: str, *, looked_at: bool) -> None:
        super().__init__(message)
        self.looked_at = looked_at


@dataclass(frozen=True)
class Listed:
    """A causal type in the installed transformers.

    Attributes:
        name: ``model_type``.
        class_name: Its causal language model.
    """

    name: str
    class_name: str


def causal_types() -> tuple[Listed, ...]:
    """Every type that ``AutoModelForCausalLM`` knows, in transformers' order."""
    return tuple(Listed(name, class_name) for name, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())


def variants() -> tuple[str, ...]:
    """The ``type@variant`` names of the settings."""
    return tuple(settings().variants)


def build(
    name: str,
    sizes: Sizes | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    with_images: bool = False,
) -> nn.Module:
    """A tiny random model on the CPU, in eval mode, without gradients.

    Its attention is sdpa where the type has it, and what transformers chooses elsewhere: `attention` says which.

    Args:
        name: A causal type, or ``type@variant``.
        sizes: Vocabulary and context.
        seed: Of all weights.
        dtype: As transformers takes it: some types keep some parameters in float32.
        with_images: Build what the type's checkpoints hold where that is more than its causal class reads: the image
            part stands beside the text part.

    Raises:
        NotBuiltError: With the reason, if it is known; otherwise with what transformers raised.
    """
    kind = name.partition("@")[0]
    try:
        with _quiet():
            auto = AutoModelForImageTextToText if with_images else AutoModelForCausalLM
            model = _constructed(name, sizes, seed, auto, dtype)
    except Exception as error:
        known = settings().unbuildable.get(kind)
        if known is not None and known.explains(error):
            raise NotBuiltError(known.because, looked_at=True) from error
        place = "tests/support/architectures/settings.yaml"
        raise NotBuiltError(
            f"nobody looked at {name!r} yet: it cannot be built as {place} has it: {described(error)}", looked_at=False
        ) from error
    _draw(model, seed)
    return model.eval().requires_grad_(requires_grad=False)


def attention(model: nn.Module) -> str:
    """The attention implementation of a model's text part."""
    return str(model.config.get_text_config()._attn_implementation)


def save(
    name: str, directory: Path, tokenizer: Path, *, context: int = 1024, seed: int = 0, with_images: bool = False
) -> Path:
    """Write a tiny model with an existing fast tokenizer, as a user has them.

    The model has as many token ids as the tokenizer, and its special tokens.

    Args:
        name: A causal type, or ``type@variant``.
        directory: Where model and tokenizer go.
        tokenizer: Directory of a fast tokenizer.
        context: Longest sequence.
        seed: Of all weights.
        with_images: As `build`.

    Returns:
        The directory.

    Raises:
        NotBuiltError: As `build`.
    """
    words = AutoTokenizer.from_pretrained(tokenizer, use_fast=True)
    special = {f"{role}_token_id": getattr(words, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    sizes = Sizes(len(words), context, special)
    model = build(name, sizes, seed=seed, with_images=with_images)
    if model.generation_config is not None:
        for field, token in special.items():
            setattr(model.generation_config, field, token)
    model.save_pretrained(directory)
    if model.config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        # The causal class holds the text part of a configuration, and only the whole is a causal type.
        configuration(name, sizes).save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def _constructed(name: str, sizes: Sizes | None, seed: int, auto: type, dtype: torch.dtype) -> nn.Module:
    """The model with transformers' own initial weights; memory that it leaves as it was is NaN."""
    with torch.random.fork_rng(devices=[]), _marked_memory():
        for attention in ("sdpa", None):
            torch.manual_seed(seed)
            try:
                # A configuration keeps the attention it was once asked for: each attempt has its own.
                return auto.from_config(configuration(name, sizes), dtype=dtype, attn_implementation=attention)
            except ValueError as error:
                if attention is None or "does not support an attention implementation" not in str(error):
                    raise
    raise AssertionError("the last attempt returns or raises")


@torch.no_grad()
def _draw(model: nn.Module, seed: int) -> None:
    """Add noise to every parameter, in place; what transformers left uninitialised is noise alone."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * NOISE
        parameter.copy_(torch.nan_to_num(parameter, nan=0.0, posinf=0.0, neginf=0.0) + noise)
    for name, buffer in model.named_buffers():
        # Tables from token id to experts come from a checkpoint; transformers leaves them zero.
        if name.endswith("tid2eid"):
            experts = model.config.get_text_config().n_routed_experts
            order = torch.rand((len(buffer), experts), generator=generator).argsort(dim=1)
            buffer.copy_(order[:, : buffer.shape[1]])


@contextlib.contextmanager
def _marked_memory() -> Iterator[None]:
    """Let torch fill memory that it does not initialise with NaN, so that what holds it is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No advice of transformers about defaults that a tiny model does not follow."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
