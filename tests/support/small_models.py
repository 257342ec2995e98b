"""A tiny random model of each kind of architecture that behaves otherwise than most: made in memory, in a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

VOCABULARY = 120
#: Longer than every text of the tests; the sliding windows are shorter.
CONTEXT = 128
SLIDING = 8

_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _BASE | {"num_key_value_heads": 2}
_GEMMA = _GROUPED | {"head_dim": 8, "sliding_window": SLIDING}
_SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
_BY_TURNS = ["sliding_attention", "full_attention"]

#: By name: the class of the configuration, and what it is given.
_CONFIGURATIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "llama, bidirectional": ("LlamaConfig", _GROUPED | {"is_causal": False}),
    "llama, one block": ("LlamaConfig", _GROUPED | {"num_hidden_layers": 1}),
    "phi3, LongRoPE": (
        "Phi3Config",
        _GROUPED
        | {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 24,
            },
        },
    ),
    "gpt2": ("GPT2Config", _SPECIAL | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}),
    "gpt_neox": ("GPTNeoXConfig", _BASE | {"rotary_pct": 0.5}),
    "bert": ("BertConfig", _BASE | {"is_decoder": True}),
    "bert, encoder": ("BertConfig", _BASE | {"is_decoder": False}),
    "openai-gpt": ("OpenAIGPTConfig", _SPECIAL | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}),
    "mpt": ("MptConfig", _SPECIAL | {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": CONTEXT}),
    "mamba": ("MambaConfig", _SPECIAL | {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}),
    "bamba": (
        "BambaConfig",
        _GROUPED
        | {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
           "mamba_n_groups": 1},
    ),
    "lfm2": ("Lfm2Config", _GROUPED | {"layer_types": ["conv", "full_attention", "conv"]}),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        _GROUPED
        | {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
           "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "zamba": (
        "ZambaConfig",
        _BASE
        | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "n_mamba_heads": 2,
           "num_key_value_heads": 4, "mamba_d_state": 8},
    ),
    "gemma3": (
        "Gemma3Config",
        {"text_config": _GEMMA, "vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 119},
    ),
    "gemma3n_text": (
        "Gemma3nTextConfig",
        _GEMMA | _PER_LAYER
        | {"laurel_rank": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 3,
           "layer_types": [*_BY_TURNS, "sliding_attention"]},
    ),
    "gemma4_text, shared keys": (
        "Gemma4TextConfig",
        _GEMMA | _PER_LAYER
        | {"num_hidden_layers": 4, "layer_types": _BY_TURNS * 2, "num_kv_shared_layers": 2, "global_head_dim": 8},
    ),
    "deepseek_v4": (
        "DeepseekV4Config",
        _SPECIAL
        | {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
           "head_dim": 16, "q_lora_rank": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "o_groups": 2,
           "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8, "sliding_window": SLIDING,
           "max_position_embeddings": CONTEXT, "layer_types": ["sliding_attention"] * 3,
           "mlp_layer_types": ["hash_moe", "moe", "moe"]},
    ),
    "hrm_text": ("HrmTextConfig", _GROUPED | {"head_dim": 8}),
    "mllama": ("MllamaConfig", {"text_config": _GROUPED | {"num_hidden_layers": 4, "cross_attention_layers": [1]}}),
}  # fmt: skip
NAMES = tuple(_CONFIGURATIONS)


def configuration(name: str) -> Any:
    """A tiny configuration.

    Args:
        name: One of `NAMES`.
    """
    import transformers

    kind, values = _CONFIGURATIONS[name]
    return getattr(transformers, kind)(**values)


def build(name: str, *, seed: int = 0, change: Callable[[Any], None] = lambda _: None) -> nn.Module:
    """A tiny model on the CPU in float32, in eval mode, without gradients; no gate of it is zero.

    Args:
        name: One of `NAMES`.
        seed: Of its weights.
        change: Changes the configuration first.
    """
    from transformers import AutoModelForCausalLM

    config = configuration(name)
    change(config)
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    except ValueError:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Memory that a type leaves as it found it.
            parameter.copy_(torch.nan_to_num(parameter, 0.0, 0.0, 0.0).clamp(-3, 3))
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(requires_grad=False)


@cache
def small(name: str) -> nn.Module:
    """The model of seed 0, built once a process; whoever changes it uses `build`.

    Args:
        name: One of `NAMES`.
    """
    return build(name)
