"""Two models of Llama-3.1-8B's and Mistral-7B's shape with random weights, and the store of their states.

Shapes are those of the published configurations: hidden 4096, 32 heads of 128, 8 of them for keys and values, an MLP of
14,336, vocabularies of 128,256 and 32,768, each with its own rope and the tokenizer that it was published with. Of the
32 blocks there are one or two, and the embedding serves as head, so that both models fit on a small machine. A
narrower width keeps the proportions. Embedding columns fall off like a power law and four lie far from zero, as in
trained models, so that spectra and sums are no easier than real ones.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _former import REPOSITORY, Spent, run_build

from featstore.demo.building import is_built, replacing, save_model
from featstore.demo.sample import sample_path
from featstore.store.write.writer import StoreWriter, exclusive

sys.path.insert(0, str(REPOSITORY))

#: Raised when the same options would give other weights.
RECIPE = 1
#: Width of a head in both models.
HEAD = 128
_COMMON = {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "rms_norm_eps": 1e-5}
_LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
#: What differs between the two: configuration, tokenizer of `tests.support.real_tokenizers`, start and end of a text.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "kind": "llama",
        "tokenizer": "llama3_1",
        "config": {
            **_COMMON,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rope_parameters": _LLAMA_ROPE,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        "start": ("<|begin_of_text|>", "<|end_of_text|>"),
    },
    "mistral": {
        "kind": "mistral",
        "tokenizer": "mistral_v3",
        "config": {
            **_COMMON,
            "vocab_size": 32768,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "start": ("<s>", "</s>"),
    },
}


@dataclass(frozen=True)
class Wide:
    """What is measured on.

    Attributes:
        width: Of both models' states; a multiple of 128.
        blocks: Of each model; every block's output is a layer of the store.
        tokens: At most, of each model's text.
        device: Where the models run.
    """

    width: int = 4096
    blocks: int = 2
    tokens: int = 26000
    device: str = "cpu"

    @property
    def layers(self) -> list[int]:
        """Layers of the store."""
        return list(range(1, self.blocks + 1)) if self.blocks > 1 else [0, 1]


def made_store(wide: Wide, folder: Path) -> tuple[Path, Spent | None]:
    """The store, extracted if the folder does not hold it yet.

    Args:
        wide: Sizes.
        folder: Kept from one call to the next.

    Returns:
        The store, and what extracting took, if it was extracted now.
    """
    own = folder / f"{wide.width}-{wide.blocks}-{wide.tokens}"
    store, done = own / "wide.zarr", own / "extracted"
    if done.is_file():
        return store, None
    models = {name: made_model(name, wide, folder) for name in SHAPES}
    own.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(store, ignore_errors=True)
    spent = run_build(REPOSITORY, extraction(wide, models, store))
    done.write_text(f"{spent.seconds:.1f} s, {spent.cpu:.1f} CPU s\n")
    return store, spent


def former_store(store: Path) -> Path:
    """The same store as the former build reads it: of format version 1, its files shared by hard links.

    Args:
        store: Of this build, complete.
    """
    place = store.with_name("former.zarr")
    if not (place / "zarr.json").is_file() or read_attributes(place)["format_version"] != 1:
        shutil.rmtree(place, ignore_errors=True)
        # A writer replaces files and never changes one.
        shutil.copytree(store, place, copy_function=os.link)
        with exclusive(place):
            writer = StoreWriter(place)
            writer.seal({"featstore": {**read_attributes(place), "format_version": 1}})
    return place


def read_attributes(store: Path) -> dict[str, Any]:
    """What a store's root says of it.

    Args:
        store: Its directory.
    """
    own: dict[str, Any] = (StoreWriter(store).attributes() or {})["featstore"]
    return own


def extraction(wide: Wide, models: dict[str, Path], store: Path) -> list[str]:
    """The command that extracts.

    Args:
        wide: Sizes.
        models: Directories by name.
        store: To be written.
    """
    command = ["-m", "featstore", "extract", "--store", str(store), "--dataset", f"jsonl:{sample_path()}"]
    command += ["--layers", ",".join(map(str, wide.layers)), "--max-tokens", str(wide.tokens)]
    # Processors without bfloat16 arithmetic multiply float32 many times faster.
    command += ["--device", wide.device, "--dtype", "float32" if wide.device == "cpu" else "bfloat16"]
    for name, place in models.items():
        command += ["--model", f"{name}={place}"]
    return command


def made_model(name: str, wide: Wide, folder: Path) -> Path:
    """A model's directory, made if the folder does not hold it yet.

    Args:
        name: Of :data:`SHAPES`.
        wide: Sizes.
        folder: Kept from one call to the next.

    Raises:
        SystemExit: The width is no multiple of a head's, or the tokenizer's registry cannot be reached.
    """
    from tests.support.real_tokenizers import load
    from tests.support.registries import UnreachableError

    if wide.width % HEAD:
        raise SystemExit(f"--width {wide.width} is no multiple of {HEAD}, the width of a head")
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{name}-{wide.width}-{wide.blocks}"
    card = {"recipe": RECIPE, "width": wide.width, "blocks": wide.blocks, "shape": SHAPES[name]["config"]}
    if is_built(place, card):
        return place
    try:
        tokenizer = load(SHAPES[name]["tokenizer"])
    except UnreachableError as error:
        raise SystemExit(f"the tokenizer of {name} cannot be had ({error})") from error
    tokenizer.bos_token, tokenizer.eos_token = SHAPES[name]["start"]
    config = configuration(name, wide)
    with replacing(place, card) as aside:
        save_model(aside, config, random_weights(config))
        tokenizer.save_pretrained(aside)
    return place


def configuration(name: str, wide: Wide) -> Any:
    """The published configuration with fewer blocks and, where the width is another, the same proportions.

    Args:
        name: Of :data:`SHAPES`.
        wide: Sizes.
    """
    from transformers import CONFIG_MAPPING

    shape = dict(SHAPES[name]["config"])
    heads = wide.width // HEAD
    shape["num_attention_heads"] = heads
    shape["num_key_value_heads"] = next(k for k in range(max(heads // 4, 1), heads + 1) if heads % k == 0)
    shape["intermediate_size"] = shape["intermediate_size"] * wide.width // 4096
    kind = SHAPES[name]["kind"]
    return CONFIG_MAPPING[kind](
        **shape,
        hidden_size=wide.width,
        head_dim=HEAD,
        num_hidden_layers=wide.blocks,
        tie_word_embeddings=True,
        architectures=[f"{kind.capitalize()}ForCausalLM"],
        dtype="bfloat16",
    )


def random_weights(config: Any) -> dict[str, torch.Tensor]:
    """Weights as before training, drawn tensor by tensor so that no more than one is held in float32.

    Args:
        config: A Llama's or a Mistral's.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    generator = torch.Generator().manual_seed(config.vocab_size)
    weights = {}
    for name, shape in shapes.items():
        if name == "lm_head.weight":
            continue
        if len(shape) == 1:
            weights[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        drawn = torch.randn(shape, generator=generator)
        if "embed" in name:
            order = torch.randperm(shape[1], generator=generator)
            drawn *= 4 * torch.arange(1, shape[1] + 1)[order] ** -0.5
            # Four columns with a mean ten times the spread of the others.
            drawn[:, order < 4] += 40.0
        else:
            # What writes into the stream is scaled down by the depth of the whole model, as usual before training.
            drawn *= 0.02 / (64**0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
        weights[name] = drawn.to(torch.bfloat16)
    return weights
