"""What results record of their models: the tests that a command needed, and the start token of a hidden prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import evaluate
from align.judging.sentences import placed
from align.runs.train import train
from align.settings import Settings
from evaluate.injection.loading import Loaded, _started
from evaluate.injection.verified import leak_at, leak_mark, leak_words, side_channels, start_token
from featstore.models.residual import capture


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verified") / "run"
    train(Settings(str(tiny_store), "affine", both=True, layers="2"), out, quiet=True)
    return out


@pytest.fixture(scope="module")
def models(run: Path) -> dict[str, Loaded]:
    return evaluate.load_models(run, device="cpu", quiet=True)


def test_the_start_token_is_the_one_that_the_tokenizer_puts_first(models: dict[str, Loaded]) -> None:
    mistral, llama = models["mistral"], models["llama"]
    [first, *_] = mistral.info.tokenizer("a")["input_ids"]
    assert first == mistral.info.tokenizer.bos_token_id
    assert start_token(mistral) == {"id": first, "token": "<s>"}
    # Whatever the configuration says.
    other = replace(mistral.stream, start=first + 7)
    assert _started(other, mistral.info).start == first
    # A tokenizer that puts none first leaves it at the configuration's.
    assert not llama.info.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"][0]
    assert start_token(llama) == {"id": llama.model.config.bos_token_id, "token": "<|im_start|>"}
    assert _started(replace(llama.stream, start=9), llama.info).start == 9


def test_a_start_token_without_a_row_in_the_embedding_is_none(models: dict[str, Loaded]) -> None:
    mistral = models["mistral"]
    stream = replace(mistral.stream, start=0, model=torch.nn.Module())
    stream.model.get_input_embeddings = lambda: torch.nn.Embedding(1, 4)  # type: ignore[assignment]
    assert _started(stream, mistral.info).start == 0


def test_the_state_of_the_start_is_that_of_the_token(models: dict[str, Loaded]) -> None:
    for loaded in models.values():
        state = loaded.stream.start_state(2)
        ids = torch.tensor([[loaded.stream.start]])
        assert torch.equal(state, capture(loaded.stream, ids, [2])[2][0, 0])


def test_a_hidden_run_names_the_start_of_every_target(run: Path, models: dict[str, Loaded], tiny_store: Path) -> None:
    result = evaluate.stitch(
        tiny_store, run, keep="hide", max_tokens=40, models=models, source_alone=True, write=False, quiet=True
    )
    assert {name: (start.id, start.token) for name, start in result.start.items()} == {
        "mistral": (models["mistral"].info.tokenizer.bos_token_id, "<s>"),
        "llama": (models["llama"].model.config.bos_token_id, "<|im_start|>"),
    }
    assert {name: list(verdict.layers) for name, verdict in result.verified.items()} == {
        "mistral": ["2"],
        "llama": ["2"],
    }
    # A window of one document has no interval; nothing else is to be objected to.
    for pair in result.pairs.values():
        assert pair.leak == 0
        assert [found.code for found in pair.warnings] == ["few-documents"]


def test_a_result_does_not_depend_on_what_was_tested_before(
    run: Path, models: dict[str, Loaded], tiny_store: Path
) -> None:
    options: dict[str, object] = {"max_tokens": 40, "write": False, "quiet": True, "device": "cpu"}
    first = evaluate.stitch(tiny_store, run, **options)  # type: ignore[arg-type]
    evaluate.stitch(tiny_store, run, keep="hide", models=models, **options | {"device": "auto"})  # type: ignore[arg-type]
    again = evaluate.stitch(tiny_store, run, models=models, **options | {"device": "auto"})  # type: ignore[arg-type]
    assert first.content() == again.content()
    assert first.verified["mistral"].continuing is None


def test_a_source_by_itself_is_verified_for_reading_alone(
    run: Path, models: dict[str, Loaded], tiny_store: Path
) -> None:
    result = evaluate.stitch(
        tiny_store, run, layers=2, source_alone=True, max_tokens=40, models=models, write=False, quiet=True
    )
    assert set(result.verified) == {"llama", "mistral"}
    assert result.verified["llama"].reading is not None


def test_words_of_a_leak() -> None:
    verified = {"m": {"layers": {"3": {"leak": 0.2134}, "4": {"leak": None}, "5": {"leak": 0.0}}}}
    leaks = {f"s:1->m:{k}": leak_at(verified, "m", k) for k in (3, 4, 5)}
    assert [leak_mark(leak) for leak in leaks.values()] == ["leak 0.21", "leak without bound", ""]
    assert leak_words(0.2134) == "leak 0.21: later blocks also learn of the text past the stream"
    # Files of earlier versions say nothing of it.
    assert (leak_mark(None, known=False), leak_words(0.0), leak_words(None, known=False)) == ("", "", "")
    found = side_channels(leaks)
    assert [finding["code"] for finding in found] == ["side-channel"] * 2
    assert placed(found[0]).startswith("s:1->m:3: the swap test leaks 0.21 at the target's layer: later blocks")
