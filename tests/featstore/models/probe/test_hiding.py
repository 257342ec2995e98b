"""The two-prompt test: exactly 0 where the prompt is hidden, and a reason where it is not. The first word counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from featstore.models import hiding, injection
from featstore.models.probe import hiding as probe
from featstore.models.probe.injecting import Texts, two_texts
from featstore.models.probe.prove import Needs, prove
from featstore.models.residual import ResidualStream, forward, watching
from featstore.models.verdict import LayerVerdict
from tests.support.tiny_models import small

#: Types whose every row is computed by itself: what is hidden changes no bit.
EXACT = (
    "llama",
    "gpt2",
    "gpt_neox",
    "gpt_bigcode",
    "ctrl",
    "bloom",
    "mpt",
    "gemma3",
    "mistral",
    "phi3@longrope",
    "openai-gpt",
)


def going_on(name: str) -> ResidualStream:
    """A type's stream, which knows how the model goes on."""
    return prove(small(name), Needs(continuing=True)).stream


def first_word_only(stream: ResidualStream) -> Texts:
    """Two prompts that differ in their first word and in nothing else; neither begins with a start token."""
    texts = two_texts(stream)
    ids = texts.ids[0].clone()
    ids[0, 0] = texts.ids[1][0, 0]
    assert stream.start not in (int(ids[0, 0]), int(texts.ids[0][0, 0]))
    with torch.inference_mode(), watching(stream, range(stream.depth + 1)) as states:
        logits = forward(stream.model, input_ids=ids).logits
    # All the difference there is has gone into every later state.
    assert (logits - texts.logits[0]).abs().amax(dim=-1).min() > 0
    return replace(
        texts, ids=(texts.ids[0], ids), logits=(texts.logits[0], logits), streams=(texts.streams[0], dict(states))
    )


def everywhere(stream: ResidualStream, texts: Texts) -> list[LayerVerdict]:
    return [probe.test_hiding(stream, texts, layer) for layer in range(stream.depth + 1)]


@pytest.mark.parametrize("name", EXACT)
def test_what_is_hidden_changes_no_bit(name: str) -> None:
    stream = going_on(name)
    for texts in (two_texts(stream), first_word_only(stream)):
        for layer, verdict in enumerate(everywhere(stream, texts)):
            assert verdict.content() == {"hide": 0, "hide_cached": 0}, layer


def test_experts_that_get_other_rows_are_no_leak() -> None:
    stream = going_on("qwen3_moe")
    for verdict in everywhere(stream, two_texts(stream)):
        assert verdict.hide_refused is None
        assert verdict.hide is not None
        assert verdict.hide_cached is not None
        assert max(verdict.hide, verdict.hide_cached) < 1e-5


# The first word.


@pytest.fixture(params=["llama", "gpt2", "gemma3"])
def stream(request: pytest.FixtureRequest) -> ResidualStream:
    return going_on(request.param)


@pytest.mark.parametrize("all_words", [True, False])
def test_a_first_word_that_is_left_in_is_seen_at_every_layer(
    stream: ResidualStream, all_words: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_it_was(_: Any, args: Any, kwargs: Any, start: torch.Tensor) -> Any:
        return args, kwargs, torch.zeros_like(start)

    monkeypatch.setattr(injection, "with_neutral_start", as_it_was)
    texts = two_texts(stream) if all_words else first_word_only(stream)
    for layer, verdict in enumerate(everywhere(stream, texts)):
        assert verdict.hide_refused is not None, layer
        assert "differ by" in verdict.hide_refused
        # Where no block is left to read it, a place is told nothing; what comes after reads it in the blocks below.
        assert (verdict.hide == 0) == (layer == stream.depth)
        assert verdict.hide_cached is not None
        assert verdict.hide_cached > 1e-3


def test_a_first_words_own_state_is_seen_where_it_is_read(
    stream: ResidualStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(injection, "with_start_state", lambda hidden, places, state: hidden)
    for layer, verdict in enumerate(everywhere(stream, first_word_only(stream))):
        assert (verdict.hide_refused is None) == (layer == stream.depth), layer
        assert (verdict.hide == 0) == (layer == stream.depth)


def test_a_first_words_own_keys_are_seen_where_they_are_read(
    stream: ResidualStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state_alone(_: Any, args: Any, kwargs: Any, start: torch.Tensor) -> Any:
        return args, kwargs, start

    monkeypatch.setattr(injection, "with_neutral_start", state_alone)
    for layer, verdict in enumerate(everywhere(stream, first_word_only(stream))):
        # In one pass nobody reads them. At layer 0 there is no block below; Gemma's first one forgets after 8 tokens.
        first = 2 if "Gemma" in type(stream.model).__name__ else 1
        assert (verdict.hide_refused is None) == (layer < first), layer
        assert verdict.hide == 0


# What leaks, and what cannot be tried.


def test_keys_of_several_tokens_that_no_mask_reaches_are_seen() -> None:
    # Blocks that attend to summaries of the prompt beside its keys.
    stream = going_on("deepseek_v4@scored")
    for verdict in everywhere(stream, two_texts(stream)):
        assert verdict.hide_refused is not None
        assert verdict.hide_refused.startswith("two prompts with the same injected states differ by ")
        assert verdict.hide_cached is not None
        assert verdict.hide_cached > 0.1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lfm2", "blocks 0, 1, 3 keep a recurrent or convolution state, which no attention mask can hide"),
        ("bamba", "blocks 0, 2 keep a recurrent or convolution state, which no attention mask can hide"),
        ("mamba", "blocks 0, 1, 2, 3 keep a recurrent or convolution state, which no attention mask can hide"),
        ("zamba", "blocks 0, 1, 2, 3, 4, 5 keep a recurrent or convolution state, which no attention mask can hide"),
        ("rwkv", "RwkvBlock gets no attention_mask, so nothing can be hidden from it; use keep='own'"),
    ],
)
def test_what_no_mask_can_hide_is_refused_for_that_reason(name: str, reason: str) -> None:
    stream = going_on(name)
    for layer, verdict in enumerate(everywhere(stream, two_texts(stream))):
        assert verdict.hide_refused == reason, layer


def test_a_leak_past_a_mask_names_both() -> None:
    # Attention and a recurrent state side by side in every block: the mask is taken, and the state goes past it.
    stream = going_on("falcon_h1")
    verdict = probe.test_hiding(stream, two_texts(stream), 1)
    assert verdict.hide_refused is not None
    assert verdict.hide_refused.startswith("two prompts with the same injected states differ by 0.")
    assert "of the largest logit: blocks 0, 1, 2, 3 keep a recurrent" in verdict.hide_refused


def test_a_side_channel_shows_in_hide_too() -> None:
    stream = going_on("gemma3n_text")
    for layer, verdict in enumerate(everywhere(stream, two_texts(stream))):
        assert (verdict.hide_refused is None) == (layer == stream.depth)


def test_attention_without_a_mask_of_positions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = going_on("llama")
    texts = two_texts(stream)
    config: Any = stream.model.config
    monkeypatch.setattr(config, "_attn_implementation", "flash_attention_2")
    verdict = probe.test_hiding(stream, texts, 1)
    assert verdict.hide_refused is not None
    assert "attention 'flash_attention_2' takes no mask of positions" in verdict.hide_refused


def test_a_mask_that_is_true_where_it_hides_is_seen_where_it_is_taken_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = going_on("mpt")
    texts = two_texts(stream)
    monkeypatch.setattr(hiding, "_hides_where_true", lambda _: False)
    for verdict in everywhere(stream, texts):
        assert verdict.hide_refused is not None
        assert verdict.hide_refused.startswith("two prompts with the same injected states differ by ")


# Mistakes that one pass does not show.


def test_steps_that_are_taken_for_the_beginning_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = going_on("llama")
    texts = two_texts(stream)
    monkeypatch.setattr(hiding, "seen", lambda _: 0)
    verdict = probe.test_hiding(stream, texts, 2)
    assert verdict.hide == 0
    assert verdict.hide_refused is not None


def test_a_cache_that_is_looked_for_by_one_name_is_not_found_and_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # The blocks of gpt_neox are given theirs as layer_past.
    stream = going_on("gpt_neox")
    texts = two_texts(stream)
    given: list[bool] = []
    handle = stream.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: given.append("past_key_values" in kwargs), with_kwargs=True
    )
    assert probe.test_hiding(stream, texts, 2).hide_refused is None
    handle.remove()
    assert not any(given)
    monkeypatch.setattr(hiding, "cache_of", lambda _: None)
    verdict = probe.test_hiding(stream, texts, 2)
    assert verdict.hide == 0
    assert verdict.hide_refused is not None


def test_blocks_below_that_show_the_prompt_to_what_comes_later_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = going_on("llama")
    texts = two_texts(stream)
    original = hiding._Hook._allowed

    def above_alone(self: Any, *args: Any) -> Any:
        return None if self.below else original(self, *args)

    monkeypatch.setattr(hiding._Hook, "_allowed", above_alone)
    for layer, verdict in enumerate(everywhere(stream, texts)):
        assert verdict.hide == 0
        assert (verdict.hide_refused is None) == (layer == 0)
