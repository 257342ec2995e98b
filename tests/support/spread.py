"""Tiny models with and without a device map, by the device that computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from featstore.models.devices import parse_device_map
from featstore.models.loading import load_model
from featstore.models.references import ModelSpec

#: Where the blocks of each family are.
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h"}
#: The embedding, whose weights are those of the head.
EMBEDDING = {"llama": "model.embed_tokens", "gpt2": "transformer.wte"}
#: Devices that compute here.
MAIN = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
#: Ways to spread a model; ``offload`` is accelerate's own, with every weight on torch's meta device.
SPREADS = ("blocks", "everything", "embedding", "offload")


def save(family: str, directory: Path) -> ModelSpec:
    """A random model of 3 blocks whose head and embedding are the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    if family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=96, num_key_value_heads=2, tie_word_embeddings=True, **sizes, **ends)
        )
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=128, **ends))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.save_pretrained(directory)
    return ModelSpec(family, str(directory))


def modules(family: str, spread: str, main: str) -> dict[str, int | str]:
    """A map of one of the kinds but ``offload``."""
    here: int | str = 0 if main == "cuda" else "cpu"
    blocks = BLOCKS[family]
    return {
        "blocks": {"": here, f"{blocks}.1": "disk", f"{blocks}.2": "cpu"},
        "everything": {"": "disk"},
        "embedding": {"": here, EMBEDDING[family]: "disk", "lm_head": "disk"},
    }[spread] | ({f"{blocks}.0": here} if main == "cuda" and spread == "everything" else {})


def plain(spec: ModelSpec, main: str) -> Any:
    """The model on one device."""
    return load_model(spec, device=main, dtype="float32")


def spread(spec: ModelSpec, kind: str, main: str) -> Any:
    """The model under a map."""
    if kind == "offload":
        from accelerate import cpu_offload

        return cpu_offload(load_model(spec, device="cpu", dtype="float32"), execution_device=torch.device(main))
    return load_model(spec, dtype="float32", device_map=parse_device_map(modules(spec.name, kind, main)))
