"""A verdict in words: what is right, what is refused, at which layers and by which figures."""

from __future__ import annotations

from typing import Any

import pytest

from featstore.models.probe.words import lines, numbers, topics
from featstore.models.verdict import Verdict

READING = {
    "future": 0.0,
    "causal": True,
    "padding": 1e-6,
    "neighbours": 0.0,
    "batching": "padded",
    "layer_0": 0.0,
    "layer_0_is_table": True,
}
CLEAN = {"self_identical": True, "leak": 0.0, "hide": 0.0, "hide_cached": 0.0}
CONTINUING = {"kind": "cached", "padded": True, "branching": "shared"}


def verdict(**more: Any) -> Verdict:
    plain = {
        "stack": "model.layers",
        "blocks": 4,
        "width": 64,
        "streams": 1,
        "stream_dtype": "float32",
        "attention": "sdpa",
        "reading": READING,
        "continuing": CONTINUING,
        "layers": {str(k): CLEAN for k in range(5)},
    }
    return Verdict.parse({**plain, **more})


def test_a_model_that_is_right_in_everything() -> None:
    assert lines(verdict()) == [
        "model: 4 blocks in model.layers, rows of width 64, float32",
        "extraction: right, windows of any length share a pass",
        "layer 0: depends on the token alone, and can be stored as a table",
        "injection: right at layers 0 to 4",
        "hide: holds at layers 0 to 4",
        "continuing: from a cache, any number of tokens at once",
        "padding: prompts of several lengths share a batch, padded at the left",
        "attention: sdpa",
    ]


def test_nothing_is_said_of_what_was_not_tested() -> None:
    said = topics(verdict(reading=None, continuing=None, layers={}))
    assert {said[name] for name in ("extraction", "layer 0", "injection", "hide", "continuing", "padding")} == {
        "not tested"
    }


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "windows of any length share a pass"),
        ({"switch": 4096}, "those of at most 4096 tokens apart from longer ones"),
        ({"batching": "equal", "padding": 0.5, "far": 0.01}, "(longer ones beside them change states by 0.5)"),
        ({"batching": "single", "neighbours": 0.25}, "(neighbours in a pass change states by 0.25)"),
        ({"batching": "single", "neighbours": None}, "change states by without bound"),
        ({"causal": False, "future": 0.77}, "reads ahead (states change by 0.77 when only later tokens change)"),
    ],
)
def test_which_windows_share_a_pass_and_why_not_all(more: dict[str, Any], words: str) -> None:
    assert words in topics(verdict(reading={**READING, **more}))["extraction"]


def test_states_that_are_no_numbers() -> None:
    assert topics(verdict(reading={**READING, "not_finite": 3}))["extraction"] == (
        "refused: layer 3 holds NaN or infinity"
    )


def test_layers_that_leak_have_the_range_of_their_figures() -> None:
    layers = {str(k): {**CLEAN, "leak": leak} for k, leak in enumerate((0.5, 0.25, 0.0, 0.333, 0.0))}
    said = topics(verdict(layers=layers))["injection"]
    assert said.startswith("right at layers 2, 4; refused at layers 0, 1, 3: the swap test leaks 0.25 to 0.5, ")
    assert "--allow-side-channel" in said
    layers["3"] = {**CLEAN, "leak": None}
    assert "the swap test leaks without bound" in topics(verdict(layers=layers))["injection"]
    layers = {"1": {**CLEAN, "self_identical": False, "leak": 0.1}}
    assert topics(verdict(layers=layers))["injection"] == (
        "right at no layer that was tested; refused at layer 1: self-injection changes the logits"
    )
    assert "reads ahead" in topics(verdict(reading={**READING, "causal": False, "future": 0.5}))["injection"]


def test_hiding_is_refused_by_reason_with_the_figures_of_all_layers() -> None:
    reason = "two prompts with the same injected states differ by {} of the largest logit"
    layers = {
        "0": {**CLEAN, "hide": 0.5, "hide_cached": 0.75, "hide_refused": reason.format("0.75")},
        "1": {**CLEAN, "hide": None, "hide_cached": None, "hide_refused": "blocks 0, 1 keep a recurrent state"},
        "2": {**CLEAN, "hide": 0.0, "hide_cached": 0.125, "hide_refused": reason.format("0.12")},
        "3": CLEAN,
    }
    assert topics(verdict(layers=layers))["hide"] == (
        f"holds at layer 3; refused at layers 0, 2: {reason.format('0.12 to 0.75')}; refused at layer 1: "
        "blocks 0, 1 keep a recurrent state"
    )
    lost = {"2": {**CLEAN, "hide": None, "hide_cached": None, "hide_refused": reason.format("inf")}}
    assert topics(verdict(layers=lost))["hide"] == f"refused at layer 2: {reason.format('without bound')}"


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ({"kind": "stepwise", "positions": True}, "from a cache, one token at a time, told its positions"),
        ({"whole_logits": True}, "from a cache, any number of tokens at once, with the logits of all tokens"),
        ({"kind": "recomputed", "branching": "reread"}, "without a cache, the whole text passed again"),
        ({"branching": "reread"}, "; a prompt is read again for each text that goes on from it"),
        ({"kind": "none"}, "refused: no way gives the logits of one pass"),
    ],
)
def test_how_a_text_goes_on(way: dict[str, Any], words: str) -> None:
    said = topics(verdict(continuing={**CONTINUING, **way}))
    assert words in said["continuing"]
    assert ("read again" in said["continuing"]) == (way == {"branching": "reread"})


def test_padding_that_changes_a_prompt() -> None:
    said = topics(verdict(continuing={**CONTINUING, "padded": False, "padding": 0.15}))["padding"]
    assert said == "prompts of one length share a batch (padding at the left changes logits by 0.15)"


def test_several_streams_and_one_block() -> None:
    said = topics(verdict(blocks=1, width=256, streams=4, attention=None))
    assert said["model"] == "1 block in model.layers, rows of width 256, 4 streams of 64 side by side, float32"
    assert said["attention"] == "the model names no implementation"


def test_numbers_in_few_words() -> None:
    assert numbers([]) == ""
    assert numbers([3]) == "3"
    assert numbers([5, 4, 1, 9, 8, 7, 1]) == "1, 4, 5, 7 to 9"
