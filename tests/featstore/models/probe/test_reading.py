"""Whether a stored row is a function of its own text: what each kind of model is found to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from featstore.errors import NonFiniteStateError
from featstore.models.layout import Batching
from featstore.models.probe import reading
from featstore.models.probe.differences import apart, furthest, rounding, spread
from featstore.models.probe.prove import Needs, prove
from featstore.models.residual import capture
from featstore.models.stack import ordinary_ids, residual_stream
from featstore.models.verdict import ReadingVerdict
from tests.support.architectures.building import build
from tests.support.tiny_models import small

#: Whether a type is causal, its batching, and whether its layer 0 is a table.
FOUND = {
    "llama": (True, Batching(), True),
    "gemma3": (True, Batching(), True),
    "mamba": (True, Batching(), True),
    "mpt": (True, Batching(), True),
    "deepseek_v4": (True, Batching(), True),
    "gemma3n_text": (True, Batching(), True),
    "phi3": (True, Batching(), True),
    "phi3@longrope": (True, Batching("padded", 16), True),
    "gpt2": (True, Batching(), False),
    "opt": (True, Batching(), False),
    "openai-gpt": (True, Batching(), False),
    "llama@bidirectional": (False, Batching("equal"), True),
    "gemma3_text@bidirectional": (False, Batching("equal"), True),
    "bert": (False, Batching("equal"), False),
}


def found(model: nn.Module) -> ReadingVerdict:
    return reading.test_reading(residual_stream(model))


@pytest.mark.parametrize("name", FOUND)
def test_what_a_model_is_found_to_be(name: str) -> None:
    verdict = found(small(name))
    causal, batching, table = FOUND[name]
    assert (verdict.causal, verdict.layer_0_is_table) == (causal, table)
    assert Batching(verdict.batching, verdict.switch) == batching
    assert (verdict.layer_0 == 0) == table
    assert verdict.not_finite is None
    assert verdict.future is not None
    assert causal == (verdict.future <= 1e-4)
    assert causal or verdict.future > 0.05
    assert verdict.neighbours is not None
    assert verdict.neighbours <= 1e-4


def test_the_figures_are_those_of_the_states_themselves() -> None:
    model = small("gpt2")
    verdict = found(model)
    # Layer 0 of gpt2 is the token's vector and that of its position: two positions differ by their vectors.
    places: Any = model.transformer.wpe.weight  # type: ignore[union-attr]
    apart_ = max(float((places[2] - places[11]).abs().max()), float((places[2] - places[5]).abs().max()))
    assert verdict.layer_0 == pytest.approx(apart_, rel=1e-5)


def test_a_model_without_positions_has_no_far_ones() -> None:
    assert found(small("mamba")).far is None
    assert found(small("mpt")).far is None
    assert (found(small("llama")).far or 0) <= 1e-4
    assert (found(small("phi3@longrope")).far or 0) > 0.1


def test_where_no_switch_is_named_windows_of_one_length_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_switch", lambda _: None)
    verdict = found(small("phi3@longrope"))
    assert (verdict.batching, verdict.switch) == ("equal", None)


def test_neighbours_that_are_read_are_kept_out() -> None:
    model = build("llama")
    block: Any = model.model.layers[1]  # type: ignore[index, union-attr]
    block.register_forward_hook(lambda _, __, output: output + 0.1 * output.mean(dim=0, keepdim=True))
    verdict = found(model)
    assert (verdict.batching, verdict.causal) == ("single", True)
    assert (verdict.neighbours or 0) > 1e-3


def test_a_shift_of_one_token_is_reading_ahead() -> None:
    model = build("llama")
    block: Any = model.model.layers[2]  # type: ignore[index, union-attr]
    # A thousandth of the next token's state.
    block.register_forward_hook(lambda _, __, output: output + 1e-3 * output.roll(-1, dims=1))
    verdict = found(model)
    assert (verdict.causal, verdict.batching) == (False, "equal")


# Half precision.


@pytest.mark.parametrize("name", ["roc_bert", "roformer", "llama@bidirectional"])
def test_who_reads_ahead_a_little_is_seen_in_half_precision(name: str) -> None:
    verdict = found(build(name, dtype=torch.bfloat16))
    assert (verdict.causal, verdict.batching) == (False, "equal")


@pytest.mark.parametrize("name", ["llama", "zaya", "mamba", "qwen3_moe"])
def test_rounding_is_no_fault_in_half_precision(name: str) -> None:
    # The stream of zaya is float32, whatever its weights are; what they compute is rounded as they are.
    verdict = found(build(name, dtype=torch.bfloat16))
    assert (verdict.causal, verdict.batching) == (True, "padded")


def test_what_counts_as_rounding_is_what_the_weights_compute_in() -> None:
    single, half = nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()
    assert rounding(single, torch.float32) == rounding(single.double(), torch.float32) == 1e-4
    for model, dtype in ((half, torch.float32), (half, torch.bfloat16), (nn.Linear(2, 2), torch.bfloat16)):
        assert rounding(model, dtype) > rounding(model, dtype, same_shape=True) > 1e-4


# What is no number.


def test_the_first_layer_that_is_no_number_is_named() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan  # type: ignore[index, union-attr]
    assert found(model).not_finite == 2
    with pytest.raises(NonFiniteStateError, match=r"model 'a', layer 2 holds NaN or infinity on ordinary tokens; try"):
        prove(model, name="a")


@pytest.mark.parametrize("needs", [Needs(continuing=True), Needs(layers=(1,)), Needs(layers=(1,), hide=True)])
def test_logits_that_are_no_numbers_are_named(needs: Needs) -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = torch.inf  # type: ignore[union-attr]
    assert prove(model).verdict.reading is not None
    with pytest.raises(NonFiniteStateError, match="model 'a': the logits hold NaN or infinity on ordinary") as caught:
        prove(model, needs, name="a")
    assert "\n" not in str(caught.value)


# Distances.


def test_distances_are_relative_and_the_largest_or_in_half_precision_the_usual_one() -> None:
    first = torch.ones(1, 3, 4)
    second = first.clone()
    second[0, 1] *= 1.5
    assert apart(first, second) == pytest.approx(0.5)
    assert apart(first.bfloat16(), second.bfloat16()) == 0
    assert apart(first, first) == 0
    assert apart(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)) == 0
    assert apart(torch.zeros(1, 1, 4), torch.ones(1, 1, 4)) == 2
    assert furthest({0: first, 1: first}, {0: first, 1: second}) == pytest.approx(0.5)
    assert spread(first, second) == 0.5
    assert spread(torch.tensor([0.0]), torch.tensor([-0.0])) == 0
    for bad in (torch.nan, torch.inf):
        assert apart(first, torch.full_like(first, bad)) == spread(first, torch.full_like(first, bad)) == float("inf")


# Passes.


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.sampled_from(["padded", "equal", "single"]),
    st.none() | st.integers(1, 30),
)
def test_every_window_is_in_one_pass_with_none_that_it_must_not_meet(
    lengths: list[int], kind: str, switch: int | None
) -> None:
    groups = Batching(kind, switch).groups(lengths)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    for group in groups:
        held = {lengths[place] for place in group}
        assert kind != "single" or len(group) == 1
        assert kind != "equal" or len(held) == 1
        assert kind != "padded" or switch is None or len({length > switch for length in held}) == 1
    if kind == "padded":
        assert len(groups) <= (1 if switch is None else 2)
    if kind == "equal":
        assert len(groups) == len(set(lengths))


def test_the_switch_is_where_the_states_change() -> None:
    stream = residual_stream(small("phi3@longrope"))
    switch = found(stream.model).switch
    assert switch == 16
    ids = ordinary_ids(stream.model, 1, switch + 1, seed=3)
    # A beginning of a text: as long as the whole is on its side of the switch, the rest changes nothing.
    beginning = [capture(stream, ids[:, :length], [stream.depth])[stream.depth][:, :8] for length in (8, 16, 17)]
    torch.testing.assert_close(beginning[0], beginning[1], rtol=1e-3, atol=1e-4)
    assert (beginning[2] - beginning[1]).norm() > 0.1 * beginning[1].norm()
