"""Where every causal type keeps its stream, read off its source and written down; nothing of it is detected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where the stream of a type is, by its source.

    Attributes:
        blocks: Path of its list of blocks.
        arrives: Path of the module that takes in the stream after the last block; None where that is only added up,
            divided or multiplied in the model's own ``forward``.
        axes: Axes of the stream in their order, of batch, token, stream and width.
        ahead: ``output_hidden_states[k]`` is the stream after block k + ahead, for k < L.
        none: Why there is no row for each token and layer.
        shown: Axes of ``output_hidden_states`` where they are others.
    """

    blocks: str = "model.layers"
    arrives: str | None = "model.norm"
    axes: str = "btw"
    ahead: int = 0
    none: str = ""
    shown: str = ""


def _places() -> Iterator[tuple[str, Place]]:
    """The types whose stream is elsewhere than Llama's, with the place."""

    def at(names: str, blocks: str, arrives: str | None, **more: Any) -> Iterator[tuple[str, Place]]:
        parent = blocks.rpartition(".")[0]
        place = Place(blocks, arrives and f"{parent}.{arrives}", **more)
        return ((name, place) for name in names.split())

    layers = "model.layers"
    yield from at("bamba falcon_h1 jamba persimmon phi zamba zamba2", layers, "final_layernorm")
    yield from at("lfm2 lfm2_moe lfm3", layers, "embedding_norm")
    yield from at("modernbert-decoder recurrent_gemma", layers, "final_norm")
    yield from at("nemotron_h", layers, "norm_f")
    yield from at("xglm", layers, "layer_norm")
    yield from at("deepseek_v4 hy_v4", layers, "hc_head", axes="btsw")
    yield from at("gemma3n_text", layers, None, axes="sbtw")
    # Its streams are already end to end.
    yield from at("qwen4_exp qwen4_exp_text", layers, "hyper_connection_mixer")
    # Its last module takes in the outputs of all blocks.
    yield from at("inkling2_text", layers, None)

    inner = "model.language_model.layers"
    yield from at("gemma3 gemma4 gemma4_unified got_ocr2 moss_transcribe_diarize", inner, "norm")
    yield from at("fuyu", inner, "final_layernorm")

    yield from at("bloom codegen falcon gpt-sw3 gpt2 gpt_bigcode gpt_neo gptj", "transformer.h", "ln_f")
    yield from at("ctrl", "transformer.h", "layernorm")
    yield from at("openai-gpt", "transformer.h", None)
    yield from at("dbrx mpt", "transformer.blocks", "norm_f")
    yield from at("gpt_neox", "gpt_neox.layers", "final_layer_norm")
    yield from at("gpt_neox_japanese", "gpt_neox_japanese.layers", "final_layer_norm")
    yield from at("biogpt", "biogpt.layers", "layer_norm")
    yield from at("opt", "model.decoder.layers", "final_layer_norm")
    yield from at("opt@350m", "model.decoder.layers", "project_out")
    yield from at("mamba mamba2 falcon_mamba", "backbone.layers", "norm_f", ahead=1)
    yield from at("rwkv", "rwkv.blocks", "ln_out", ahead=1)
    yield from at("xlstm", "backbone.blocks", "out_norm")
    yield from at("git", "git.encoder.layer", None)
    yield from at("xlnet", "transformer.layer", None, axes="tbw", shown="btw")

    decoder = "model.decoder.layers"
    yield from at("blenderbot mbart pegasus whisper", decoder, "layer_norm")
    yield from at("bart bigbird_pegasus blenderbot-small marian mvp plbart trocr", decoder, None)
    for prefix, names in {
        "bert": "bert bert-generation big_bird megatron-bert",
        "roberta": "camembert roberta xlm-roberta xlm-roberta-xl xmod",
        "data2vec_text": "data2vec-text",
        "electra": "electra",
        "ernie": "ernie",
        "rembert": "rembert",
        "roberta_prelayernorm": "roberta-prelayernorm",
        "roc_bert": "roc_bert",
        "roformer": "roformer",
    }.items():
        yield from at(names, f"{prefix}.encoder.layer", None)

    for name, (path, none) in {
        "blt": ("model.global_transformer.layers", "its blocks see patches of bytes, not tokens"),
        "cpmant": ("cpmant.encoder.layers", "32 slots for a prompt stand before the tokens in its stream"),
        "hrm_text": ("model.L_module.layers", "its blocks run several times in one pass"),
        "mllama": ("model.layers", "its cross-attention blocks do not run on text alone"),
        "prophetnet": ("prophetnet.decoder.layers", "its stream holds three positions for each token"),
        "reformer": ("reformer.encoder.layers", "its blocks are reversible: two streams go through them"),
        "xlm": ("transformer.attentions", "its blocks are no modules, only their parts are"),
    }.items():
        yield name, Place(path, None, none=none)


_PLACES = dict(_places())


def place_of(name: str) -> Place:
    """Where the stream of a type, or ``type@variant``, is."""
    return _PLACES.get(name) or _PLACES.get(name.partition("@")[0]) or Place()
