"""Models that cannot be read: each is one line that says why, leaves nothing behind, and does not stand in the way."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from featstore import open_store
from tests.support.commands import Outcome, call, strict_json
from tests.support.tiny_models import save_with_tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 16}


@dataclass
class Workplace:
    """Where models are saved and commands are run."""

    base: Path
    corpus: Path
    tokenizer: Any
    capsys: pytest.CaptureFixture[str]

    def saved(self, name: str, model: Any) -> Path:
        return save_with_tokenizer(model, self.base / name, self.tokenizer)

    def extract(self, path: Path, *words: object) -> Outcome:
        return call(
            *(self.capsys, "featstore", "extract", "--model", f"x={path}", "--layers", "0,100%"),
            *("--dataset", f"jsonl:{self.corpus}", "--max-tokens", 3000, "--window-bytes", 512, "--format", "float32"),
            *("--device", "cpu", "--store", self.store, "--json", *words),
        )

    @property
    def store(self) -> Path:
        return self.base / "s.zarr"


@pytest.fixture
def here(
    tmp_path: Path, short_corpus: Path, start_token_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> Workplace:
    return Workplace(tmp_path, short_corpus, start_token_tokenizer, capsys)


def llama(vocabulary: int, change: Callable[[Any], None] = lambda _: None, **config: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": vocabulary, **config}))
    with torch.no_grad():
        change(model)
    return model


def raises(vocabulary: int) -> Any:
    """Its table of positions is shorter than its texts, and shorter than any window."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=8, n_embd=32, n_layer=2, n_head=2, **ends))


def states_are_nan(vocabulary: int) -> Any:
    def change(model: Any) -> None:
        model.model.layers[1].mlp.down_proj.weight[3] = torch.nan

    return llama(vocabulary, change)


def no_text(_: int) -> Any:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**VISION))


def no_generation(vocabulary: int) -> Any:
    """A text model and an image model side by side, neither of which writes."""
    from transformers import CLIPConfig, CLIPModel

    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return CLIPModel(CLIPConfig(text_config={**SMALL, "vocab_size": vocabulary, **ends}, vision_config=VISION))


def encoder_and_decoder(vocabulary: int) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=vocabulary, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    )


BAD = {
    "raises": (
        raises,
        r"model 'x': GPT2LMHeadModel cannot be run on 13 ordinary tokens: IndexError: index out of range in self;",
    ),
    "NaN": (
        states_are_nan,
        r"model 'x', layer 2 holds NaN or infinity on ordinary tokens; try --dtype float32, or check the model's",
    ),
    "no text": (no_text, r"model 'x' \(\S+\): the configuration of a vit names no vocabulary; give a causal language"),
    "no generation": (
        no_generation,
        r"model 'x' \(\S+\): transformers has no causal language model for a clip; give one, or the text model inside",
    ),
    "encoder and decoder": (
        encoder_and_decoder,
        r"model 'x' \(\S+\): transformers has no causal language model for a t5; give one",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_it_is_one_line_and_the_corrected_command_works_in_the_same_place(case: str, here: Workplace) -> None:
    make, words = BAD[case]
    vocabulary = len(here.tokenizer)
    refused = here.extract(here.saved("bad", make(vocabulary)))
    assert (refused.code, refused.out) == (2, "")
    lines = refused.err.splitlines()
    assert [line.split(maxsplit=1)[0] for line in lines] in (["featstore:"], ["testing", "featstore:"])
    assert re.match(f"featstore: {words}", lines[-1]), lines[-1]
    assert not here.store.exists()
    assert here.extract(here.saved("good", llama(vocabulary))).json["models"]["x"]["rows"] > 1000
    assert open_store(here.store).model("x").attributes["verified"]["blocks"] == 2


def test_a_state_that_turns_bad_in_the_text_does_not_stand_in_the_way(here: Workplace) -> None:
    [token] = here.tokenizer("the", add_special_tokens=False)["input_ids"]

    def change(model: Any) -> None:
        model.model.embed_tokens.weight[token] = torch.nan

    vocabulary = len(here.tokenizer)
    refused = here.extract(here.saved("bad", llama(vocabulary, change)))
    assert refused.code == 2
    assert "NaN or infinity" in refused.err.splitlines()[-1]
    # The corrected weights are other weights; no row of the bad ones is there.
    assert here.extract(here.saved("good", llama(vocabulary))).json["models"]["x"]["rows"] > 1000


def test_logits_that_are_no_numbers_leave_the_rows_right_and_forbid_the_rest(here: Workplace) -> None:
    def change(model: Any) -> None:
        model.lm_head.weight[3] = torch.nan

    assert here.extract(here.saved("x", llama(len(here.tokenizer), change))).code == 0
    run = here.base / "run"
    done = call(
        *(here.capsys, "align", "train", "--store", here.store, "--source", "x", "--target", "x"),
        *("--layers", "2", "--out", run),
    )
    assert done.code == 0
    before = sorted(path.name for path in run.iterdir())
    for command, more in {
        "stitch": ("--store", here.store),
        "generate": (),
        "communicate": ("--examples", 2, "--task", "lookup:1"),
    }.items():
        refused = call(here.capsys, "evaluate", command, "--adapter", run, *more)
        assert (refused.code, refused.out) == (2, "")
        assert refused.err.splitlines()[-1] == (
            "evaluate: model 'x': the logits hold NaN or infinity on ordinary tokens; try --dtype float32, or check "
            "the weights of its head"
        )
        assert sorted(path.name for path in run.iterdir()) == before


def test_a_stack_of_one_block_is_like_any_other(here: Workplace) -> None:
    assert here.extract(here.saved("x", llama(len(here.tokenizer), num_hidden_layers=1))).code == 0
    for layer in (0, 1):
        run = here.base / f"run-{layer}"
        words = ("--store", here.store, "--source", "x", "--target", "x", "--layers", layer, "--out", run)
        assert call(here.capsys, "align", "train", *words).code == 0
        for keep in ("own", "hide"):
            words = ("--store", here.store, "--adapter", run, "--keep", keep, "--max-tokens", 300, "--json")
            [entry] = call(here.capsys, "evaluate", "stitch", *words).json["pairs"].values()
            assert entry["self_bit_identical"]
            assert entry["leak"] == 0
        said = call(here.capsys, "evaluate", "generate", "--adapter", run, "--max-new-tokens", 3, "--json").json
        for told in said["entries"]:
            assert told["source_to_target"][f"x:{layer}->x:{layer}"]["self"] == told["target_alone"]
        words = ("--adapter", run, "--examples", 2, "--task", "lookup:1", "--json")
        [entry] = call(here.capsys, "evaluate", "communicate", *words).json["tasks"].values()
        assert entry["reasons"] == {}


def test_infinities_in_a_configuration_are_read_and_no_file_has_one(here: Workplace) -> None:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = Mamba2Config(vocab_size=len(here.tokenizer), **sizes, **ends)
    path = here.saved("x", Mamba2ForCausalLM(config))
    assert "Infinity" in (path / "config.json").read_text()
    assert here.extract(path).code == 0
    for file in here.store.rglob("*.json"):
        strict_json(file.read_text())
