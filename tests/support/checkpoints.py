"""Checkpoints that are changed on disk, and adapters beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from featstore.models.references import ModelSpec

WEIGHTS = "model.safetensors"


def spec_of(path: Path) -> ModelSpec:
    return ModelSpec("m", str(path))


def edit(
    path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None], **config: Any
) -> Path:
    """Change a checkpoint's tensors in place, and its configuration."""
    tensors = load_file(path / WEIGHTS)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, path / WEIGHTS, metadata={"format": "pt"})
    if config:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return path


def silence_a_head(tensors: dict[str, torch.Tensor]) -> None:
    """The second of four heads of the tiny Llama says nothing any more."""
    for name, tensor in tensors.items():
        if name.endswith("o_proj.weight"):
            tensor[:, 12:24] = 0


def without_a_block(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint whose second block is missing."""
    return {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}


def lora(base: Path, into: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Write a random LoRA of the query projections; returns what it adds to each of the base's tensors."""
    into.mkdir(exist_ok=True)
    config = {
        "base_model_name_or_path": str(base),
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        **options,
    }
    (into / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors, added = {}, {}
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (torch.randn(shape, generator=generator) * 0.3 for shape in ((4, 48), (48, 4)))
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        added[f"{name}.weight"] = config["lora_alpha"] / 4 * b @ a
    save_file(tensors, into / "adapter_model.safetensors")
    return added
