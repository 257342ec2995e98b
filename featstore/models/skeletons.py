"""A model without its weights: what it is made of and which attention it will run, before anything large is read."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from featstore.errors import AttentionError
from featstore.models.adapters import find_adapter
from featstore.models.attention import ATTENTIONS, AUTO, parse_attention
from featstore.models.opening import choose, loading, read_config, who
from featstore.models.references import ModelSpec


def skeleton(spec: ModelSpec, attention: str | None = None) -> Any:
    """A model without weights, on torch's meta device: what it is made of, in a fraction of a second.

    An adapter adds nothing to it.

    Args:
        spec: Name and reference.
        attention: One of :data:`~featstore.models.attention.ATTENTIONS` but ``auto``; None for the model's own choice.

    Raises:
        ModelLoadError: Not found, damaged, or no causal language model has this configuration.
        AttentionError: The model's files name an implementation that is not in the list.
        ImportError: The attention needs a package that is not installed.
        ValueError: The model does not have the attention.
    """
    from transformers import AutoModelForCausalLM

    with loading(spec):
        adapter = find_adapter(spec)
        config = read_config(adapter.base if adapter else spec)
        choose(config, attention)
    with loading(spec, but=() if attention is None else (ImportError, ValueError)), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def running_attention(model: Any) -> str:
    """The attention implementation that a model's text blocks run.

    Args:
        model: A transformers causal language model, or a wrapper around one.
    """
    return str(model.config.get_text_config()._attn_implementation)  # noqa: SLF001 - the one place that says so


def choose_attention(spec: ModelSpec, wanted: str = AUTO) -> str:
    """The attention implementation that a model will run, before its weights are read.

    Args:
        spec: Name and reference.
        wanted: One of :data:`~featstore.models.attention.ATTENTIONS`; ``auto`` for sdpa where the model has it, else
            its own.

    Raises:
        ModelLoadError: As :func:`skeleton`.
        AttentionError: It is not in the list, or the model does not have it.
    """
    return running_attention(skeleton(spec, asked_of(spec, wanted)))


def asked_of(spec: ModelSpec, wanted: str) -> str | None:
    """What a model's configuration is to ask for, so that its text blocks run an attention implementation.

    Args:
        spec: Name and reference.
        wanted: As of :func:`choose_attention`.

    Returns:
        The name, or None where the model's own choice gives it.

    Raises:
        ModelLoadError: As :func:`skeleton`.
        AttentionError: It is not in the list, or the model does not have it.
    """
    if parse_attention(wanted, f"what is asked of {who(spec)}") == AUTO:
        return None  # transformers takes sdpa where a model has it, part by part
    with suppress(ValueError, ImportError):
        if running_attention(skeleton(spec, wanted)) == wanted:
            return wanted
    own = running_attention(skeleton(spec))
    if own == wanted:
        return None  # the text blocks have it; another part of the model, such as a vision tower, does not
    has = " and ".join(dict.fromkeys((own, "eager")))
    raise AttentionError(
        f"attention {wanted!r}: {who(spec)} does not have it here; it has {has}: use --attn auto or one of them"
    )


def check_running(spec: ModelSpec, model: Any, wanted: str) -> None:
    """Compare the attention that a loaded model runs with what was chosen.

    Args:
        spec: Name and reference.
        model: As loaded.
        wanted: As of :func:`choose_attention`.

    Raises:
        AttentionError: Its text blocks run another, or one of its parts runs one that is not in the list.
    """
    running = running_attention(model)
    if wanted not in (AUTO, running):
        raise AttentionError(f"attention {wanted!r}: {who(spec)} runs {running!r} instead; use --attn auto or another")
    configs = (getattr(module, "config", None) for module in model.modules())
    names = {getattr(config, "_attn_implementation", None) for config in configs} - {None}
    for name in sorted(names - set(ATTENTIONS), key=str):
        raise AttentionError(
            f"attention {name!r}: a part of {who(spec)} runs it, and it is none of {', '.join(ATTENTIONS[1:])}"
        )


def embedding_rows(spec: ModelSpec) -> int:
    """Rows of the embedding of a model that is built without memory for its weights; 0 where it cannot be built.

    Args:
        spec: Name and reference; nothing is fetched for it but its configuration.
    """
    from transformers import AutoModelForCausalLM

    adapter = find_adapter(spec, local=True)
    try:
        with loading(spec), torch.device("meta"):
            config = read_config(adapter.base if adapter else spec)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return int(model.get_input_embeddings().weight.shape[0])
    except Exception:  # noqa: BLE001 - whatever prevents it: the configuration has to do
        return 0
