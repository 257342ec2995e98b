"""Commands that need several models have one in memory at a time."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

import evaluate
import evaluate.injection.loading as loading
from align.runs.train import train
from align.settings import Settings


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one") / "run"
    train(Settings(str(tiny_store), "affine", layers="2", both=True), directory, quiet=True)
    return directory


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every model that is loaded, with how many loaded before it are still there."""
    seen: list[tuple[str, int]] = []
    held: list[Any] = []
    original = loading.models.load_model

    def load(spec: Any, **options: Any) -> Any:
        seen.append((spec.name, sum(one() is not None for one in held)))
        model = original(spec, **options)
        held.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading.models, "load_model", load)
    gc.disable()
    yield seen
    gc.enable()


ASKED: dict[str, Any] = {"max_new_tokens": 2, "write": False, "device": "cpu", "quiet": True}


def test_texts(run: Path, alive: list[tuple[str, int]]) -> None:
    found = evaluate.generate(run, ["The capital of France is"], **ASKED)
    assert alive == [("llama", 0), ("mistral", 0), ("llama", 0)]
    alive.clear()
    # As with both in memory.
    models = evaluate.load_models(run, device="cpu", quiet=True)
    assert evaluate.generate(run, ["The capital of France is"], models=models, **ASKED).content() == found.content()


def test_answers(run: Path, alive: list[tuple[str, int]]) -> None:
    asked = {**ASKED, "examples": 3, "itself": True, "summary_tokens": 2}
    found = evaluate.communicate(run, ["countries", "lookup:1"], **asked)
    # The second task begins with the model that the first one ended with.
    assert alive == [("llama", 0), ("mistral", 0), ("llama", 0), ("mistral", 0), ("llama", 0)]
    models = evaluate.load_models(run, device="cpu", quiet=True)
    assert evaluate.communicate(run, ["countries", "lookup:1"], models=models, **asked).content() == found.content()


def test_stitched_losses(run: Path, tiny_store: Path, alive: list[tuple[str, int]]) -> None:
    asked: dict[str, Any] = {"max_tokens": 60, "source_alone": True, "write": False, "device": "cpu", "quiet": True}
    evaluate.stitch(tiny_store, run, **asked)
    assert alive == [("mistral", 0), ("llama", 0)]
