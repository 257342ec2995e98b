"""How a model goes on from a prompt: the cheapest way that says what one pass over the whole text says."""

from __future__ import annotations

import pytest
import torch

from featstore.models import passes
from featstore.models.probe import continuing as probe
from featstore.models.stack import residual_stream
from featstore.models.verdict import ContinuingVerdict
from tests.support.architectures.building import build
from tests.support.tiny_models import small

#: By type: kind, positions, whole_logits, padded, branching.
FOUND = {
    "llama": ("cached", False, False, True, "shared"),
    "gpt_neox": ("cached", False, False, True, "shared"),
    "gemma3": ("cached", False, False, True, "shared"),
    "lfm2": ("cached", False, False, True, "shared"),
    "qwen3_5_text": ("cached", False, False, True, "shared"),
    "phi3@longrope": ("cached", False, False, True, "shared"),
    "deepseek_v4": ("cached", False, False, False, "shared"),
    "bamba": ("cached", True, False, True, "shared"),
    "gemma4_text": ("cached", False, True, True, "shared"),
    "mamba": ("stepwise", False, False, True, "reread"),
    "jamba": ("stepwise", False, False, True, "shared"),
    "openai-gpt": ("recomputed", False, False, True, "shared"),
    "rwkv": ("recomputed", False, False, False, "shared"),
}


def found(name: str) -> ContinuingVerdict | None:
    return probe.test_continuing(residual_stream(small(name)))


def outline(verdict: ContinuingVerdict) -> tuple[object, ...]:
    return verdict.kind, verdict.positions, verdict.whole_logits, verdict.padded, verdict.branching


@pytest.mark.parametrize("name", FOUND)
def test_the_way_that_suits_a_model(name: str) -> None:
    verdict = found(name)
    assert verdict is not None
    assert outline(verdict) == FOUND[name]
    assert verdict.difference is not None
    assert verdict.difference <= 1e-4
    assert verdict.padded == (verdict.padding is not None and verdict.padding <= 1e-4)


def test_a_model_that_reads_ahead_goes_on_in_no_way() -> None:
    assert found("llama@bidirectional") is None
    assert found("bert") is None


def test_float32_logits_of_half_precision_weights_are_rounded_as_these() -> None:
    verdict = probe.test_continuing(residual_stream(build("falcon_mamba", dtype=torch.bfloat16)))
    assert verdict is not None
    assert verdict.kind == "stepwise"


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "jamba", "bamba"])
def test_texts_that_meet_in_one_cache_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if a cache that is written in place made new tensors when it grows.
    monkeypatch.setattr(passes, "grows", lambda _: True)
    verdict = found(name)
    assert verdict is not None
    assert verdict.branching == "reread"
    # What makes new tensors is shared in any case.
    plain = found("llama")
    assert plain is not None
    assert plain.branching == "shared"


def test_rows_that_cannot_be_chosen_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "selected", lambda past, rows: past)
    verdict = found("llama")
    assert verdict is not None
    assert (verdict.kind, verdict.branching) == ("cached", "reread")


def test_what_a_way_raises_is_no_failure_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    original = passes.Passes._pass

    def only_whole(self: passes.Passes, *args: object) -> torch.Tensor:
        if self._how.kind != "recomputed":
            raise NotImplementedError("no cache today")
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(passes.Passes, "_pass", only_whole)
    verdict = found("llama")
    assert verdict is not None
    assert verdict.kind == "recomputed"
