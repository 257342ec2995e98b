"""Which target position takes which source state, and what an injected forward pass gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import evaluate.injection.controls
from align.layers import LayerPair
from align.maps.fitted import Aligner
from evaluate.injection.controls import CONTROLS, control_states
from evaluate.injection.positions import source_positions
from featstore.errors import LayerRangeError, NonFiniteStateError, SpecError
from featstore.models import residual as sites
from featstore.models.injection import COMBINE, Injection, aligned, inject, last
from featstore.models.loading import load_model
from featstore.models.references import ModelSpec
from featstore.models.stack import residual_stream
from featstore.text.tokens import TokenizedWindow


def window(ends: list[int], special: list[bool] | None = None) -> TokenizedWindow:
    flags = np.array(special if special is not None else [False] * len(ends), dtype=bool)
    return TokenizedWindow(np.zeros(len(ends), np.int32), np.array(ends, np.int32), flags)


@st.composite
def windows(draw: st.DrawFn) -> TokenizedWindow:
    """Non-decreasing byte ends, some shared; special tokens anywhere, whose byte end is 0."""
    ends = sorted(draw(st.lists(st.integers(1, 20), max_size=15)))
    special = draw(st.lists(st.booleans(), min_size=len(ends), max_size=len(ends)))
    return window([0 if s else e for e, s in zip(ends, special, strict=True)], special)


def slow_positions(source: TokenizedWindow, target: TokenizedWindow) -> list[int]:
    readers = [s for s in range(len(source.ids)) if not source.special[s]]
    taken = []
    for t, end in enumerate(target.byte_end):
        sharing = [u for u in range(len(target.ids)) if not target.special[u] and target.byte_end[u] == end]
        there = [s for s in readers if source.byte_end[s] == end]
        if target.special[t]:
            taken.append(-1)
        elif len(there) == len(sharing):
            taken.append(there[sharing.index(t)])
        else:
            # Only the last of those that share an end has read up to it.
            read = [s for s in readers if source.byte_end[s] < end or (t == sharing[-1] and s in there)]
            taken.append(read[-1] if read else -1)
    return taken


@given(source=windows(), target=windows())
def test_positions_equal_the_slow_search(source: TokenizedWindow, target: TokenizedWindow) -> None:
    assert source_positions(source, target).tolist() == slow_positions(source, target)


@given(source=windows())
def test_a_window_takes_exactly_its_own_states(source: TokenizedWindow) -> None:
    own = np.where(source.special, -1, np.arange(len(source.ids)))
    np.testing.assert_array_equal(source_positions(source, source), own)


@given(source=windows(), target=windows())
def test_no_position_is_told_what_comes_after_it(source: TokenizedWindow, target: TokenizedWindow) -> None:
    taken = source_positions(source, target)
    ends = target.byte_end
    for position in np.flatnonzero(taken >= 0):
        assert source.byte_end[taken[position]] <= ends[position]
        later = [p for p in range(position + 1, len(ends)) if not target.special[p] and ends[p] == ends[position]]
        if later and source.byte_end[taken[position]] == ends[position]:
            # In the middle of a character: the source token must be in its middle, too.
            assert taken[position] < taken[later[0]]


def test_tokens_that_share_a_character_correspond_one_by_one_or_not_at_all() -> None:
    # A three-byte character after "a", as one, two and three tokens.
    one, two, three = window([1, 4, 5]), window([1, 4, 4, 5]), window([1, 4, 4, 4, 5])
    assert source_positions(three, three).tolist() == [0, 1, 2, 3, 4]
    assert source_positions(three, one).tolist() == [0, 3, 4]
    assert source_positions(one, three).tolist() == [0, 0, 0, 1, 2]
    assert source_positions(two, three).tolist() == [0, 0, 0, 2, 3]


def test_the_state_is_that_of_the_last_token_ending_at_or_before() -> None:
    # Source reads "ab|cde|f", target "a|bc|d|ef"; the target's first token ends before any source token does.
    assert source_positions(window([2, 5, 6]), window([1, 3, 4, 6])).tolist() == [-1, 0, 0, 2]


def test_no_source_token_means_every_target_token_keeps_its_own() -> None:
    assert source_positions(window([0], [True]), window([1, 2])).tolist() == [-1, -1]
    assert source_positions(window([]), window([1])).tolist() == [-1]
    assert source_positions(window([1]), window([])).tolist() == []


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request: pytest.FixtureRequest, tiny_llama: Path, tiny_mistral: Path) -> Any:
    path = {"llama": tiny_llama, "mistral": tiny_mistral}[request.param]
    return load_model(ModelSpec(request.param, str(path)), device="cpu", dtype="float32")


def prompt(model: Any, tokens: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(5, model.config.vocab_size, (2, tokens), generator=generator)


def logits_with(model: Any, ids: torch.Tensor, layer: int, hidden: torch.Tensor, *, whole: bool) -> torch.Tensor:
    everywhere = Injection(layer, hidden, torch.ones(hidden.shape[:2], dtype=torch.bool))
    with torch.inference_mode(), inject(residual_stream(model), everywhere, whole=whole):
        return model(input_ids=ids, use_cache=not whole).logits


@pytest.mark.parametrize("whole", [True, False])
def test_a_models_own_states_change_no_bit(model: Any, whole: bool) -> None:
    stream, ids = residual_stream(model), prompt(model)
    with torch.inference_mode():
        clean = model(input_ids=ids, use_cache=not whole).logits
    states = sites.capture(stream, ids, range(stream.depth + 1))
    for layer, hidden in states.items():
        assert torch.equal(logits_with(model, ids, layer, hidden, whole=whole), clean), layer
    # Nothing is left behind.
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids, use_cache=not whole).logits, clean)


def test_other_states_change_what_comes_after_them_and_nothing_before(model: Any) -> None:
    stream, ids = residual_stream(model), prompt(model)
    layer = 1
    hidden = sites.capture(stream, ids, [layer])[layer].clone()
    hidden[:, 10] += 1.0
    with torch.inference_mode():
        clean = model(input_ids=ids, use_cache=False).logits
    for whole in (True, False):
        logits = logits_with(model, ids, layer, hidden, whole=whole)
        torch.testing.assert_close(logits[:, :10], clean[:, :10])
        assert (logits[:, 10:12] - clean[:, 10:12]).abs().max() > 1e-3


def test_skipping_what_is_overwritten_changes_no_bit(model: Any) -> None:
    stream, ids = residual_stream(model), prompt(model)
    for layer in range(stream.depth + 1):
        hidden = torch.randn(2, 40, model.config.hidden_size, generator=torch.Generator().manual_seed(layer))
        everywhere = Injection(layer, hidden, torch.ones(hidden.shape[:2], dtype=torch.bool))
        with torch.inference_mode(), inject(stream, everywhere, whole=False):
            slow = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(logits_with(model, ids, layer, hidden, whole=True), slow), layer


# Injections.


def passed(model: Any, ids: torch.Tensor, injection: Injection, *, whole: bool, cache: bool = True) -> torch.Tensor:
    """Logits of the prompt's pass."""
    stream = residual_stream(model)
    with torch.inference_mode(), inject(stream, injection, whole=whole):
        return model(input_ids=ids, use_cache=cache and not whole).logits


@pytest.mark.parametrize(("whole", "cache"), [(True, False), (False, False), (False, True)])
def test_own_states_put_back_in_any_way_change_no_bit(model: Any, whole: bool, cache: bool) -> None:
    stream, ids = residual_stream(model), prompt(model)
    with torch.inference_mode():
        clean = model(input_ids=ids, use_cache=cache).logits
    for layer, own in sites.capture(stream, ids, range(stream.depth + 1)).items():
        places = [[0, 3, 39], range(40)]
        ways = {
            "aligned": aligned(own, [own[0, places[0]], own[1]], places, layer=layer),
            "none": aligned(own, [own[0, :0], own[1, :0].numpy()], [[], []], layer=layer),
            "replace": last(own, own[:, -1], layer=layer),
            "sum": last(own, torch.zeros(2, own.shape[2]), layer=layer, how="sum"),
            "mean": last(own, own[:, -1].numpy(), layer=layer, how="mean"),
        }
        for name, injection in ways.items():
            assert torch.equal(passed(model, ids, injection, whole=whole, cache=cache), clean), (layer, name)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids, use_cache=cache).logits, clean)


def test_states_land_at_their_places_and_nowhere_else() -> None:
    own = torch.arange(2 * 4 * 3, dtype=torch.float32).reshape(2, 4, 3)
    before = own.clone()
    states = [np.full((2, 3), -1.0), torch.full((1, 3), -2.0, dtype=torch.float64)]
    injection = aligned(own, states, [[3, 1], np.array([0])], layer=1, keep="hide")
    assert torch.equal(own, before)
    assert injection.replaced.tolist() == [[False, True, False, True], [True, False, False, False]]
    assert torch.equal(injection.hidden[~injection.replaced], own[~injection.replaced])
    assert (injection.hidden[0, [1, 3]] == -1).all()
    assert (injection.hidden[1, 0] == -2).all()
    assert (injection.hidden.dtype, injection.layer, injection.keep) == (torch.float32, 1, "hide")
    ordered = aligned(own, [torch.eye(3)[:2], own[1, :0]], [[3, 1], []], layer=1)
    assert torch.equal(ordered.hidden[0, [3, 1]], torch.eye(3)[:2])


def test_the_last_position_takes_the_state_its_sum_or_its_mean() -> None:
    own, state = torch.randn(2, 4, 3), torch.randn(2, 3)
    wanted = {"replace": state, "sum": own[:, -1] + state, "mean": (own[:, -1] + state) / 2}
    assert set(wanted) == set(COMBINE)
    for how, value in wanted.items():
        injection = last(own, state, layer=2, how=how, keep="hide")
        torch.testing.assert_close(injection.hidden[:, -1], value, rtol=0, atol=1e-7)
        assert torch.equal(injection.hidden[:, :-1], own[:, :-1])
        assert injection.replaced.tolist() == [[False, False, False, True]] * 2
        assert (injection.layer, injection.keep) == (2, "hide")


def test_a_sum_in_half_precision_is_rounded_once() -> None:
    own = torch.full((1, 1, 1), 256.0, dtype=torch.bfloat16)
    injection = last(own, torch.tensor([[1.001]]), layer=0, how="mean")
    assert injection.hidden.dtype == torch.bfloat16
    # The state in bfloat16 would be 1, the mean 128.5 and its nearest even 128.
    assert float(injection.hidden) == 129.0


def test_the_start_is_each_rows_first_token() -> None:
    own, padding = torch.zeros(2, 4, 3), torch.tensor([[True, True, False, False], [False] * 4])
    injection = last(own, own[:, -1], layer=0, padding=padding)
    assert injection.start.tolist() == [[False, False, True, False], [True, False, False, False]]
    assert last(own, own[:, -1], layer=0).start.tolist() == [[True, False, False, False]] * 2


def test_a_pass_that_is_not_the_injections_is_refused(model: Any) -> None:
    stream, ids = residual_stream(model), prompt(model)
    own = sites.capture(stream, ids, [1])[1]
    injection = aligned(own, [own[0], own[1]], [range(40)] * 2, layer=1)
    with pytest.raises(SpecError, match=r"stream of shape \(2, 5, "):
        passed(model, ids[:, :5], injection, whole=False)
    with pytest.raises(SpecError, match=r"stream of shape \(1, 40, "):
        passed(model, ids[:1], injection, whole=False)
    with torch.inference_mode():
        past = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        with inject(stream, injection, whole=False), pytest.raises(SpecError, match="goes on from 5 cached tokens"):
            model(input_ids=ids[:, 5:], past_key_values=past)
        past = model(input_ids=ids, use_cache=True).past_key_values
        with inject(stream, injection, whole=True), pytest.raises(SpecError, match="without a cache"):
            model(input_ids=ids[:, :1], past_key_values=past)
    with pytest.raises(LayerRangeError), inject(stream, last(own, own[:, -1], layer=9), whole=False):
        pass
    assert not stream.decoder._forward_pre_hooks
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in stream.blocks)


def test_a_step_after_a_prompt_of_one_token_is_no_prompt(model: Any) -> None:
    stream, ids = residual_stream(model), prompt(model)[:, :1]
    own = sites.capture(stream, ids, [1])[1]
    state = torch.ones_like(own[:, 0])
    with torch.inference_mode():
        with inject(stream, last(own, state, layer=1), whole=False):
            first = model(input_ids=ids, use_cache=True)
            inside = model(input_ids=ids, past_key_values=first.past_key_values).logits
        with inject(stream, last(own, state, layer=1), whole=False):
            past = model(input_ids=ids, use_cache=True).past_key_values
        outside = model(input_ids=ids, past_key_values=past).logits
    assert torch.equal(inside, outside)


OWN = torch.zeros(2, 4, 3)
FLAGS = torch.zeros(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Injection(0, OWN, FLAGS, keep="none"), "keep 'none': choose one of own, hide"),
        (lambda: Injection(0, OWN[0], FLAGS), r"shape \(4, 3\): give"),
        (lambda: Injection(0, OWN[:, :0], FLAGS[:, :0]), "none of them 0"),
        (
            lambda: Injection(0, OWN, FLAGS[:1]),
            r"replaced is torch.bool of shape \(1, 4\); give bool of shape \(2, 4\)",
        ),
        (lambda: Injection(0, OWN, FLAGS.long()), "replaced is torch.int64"),
        (lambda: Injection(0, OWN, FLAGS, padding=FLAGS.long()), "padding is torch.int64"),
        (lambda: Injection(0, OWN, FLAGS, padding=~FLAGS), "padding must lie at the left"),
        (
            lambda: Injection(0, OWN, FLAGS, padding=torch.tensor([[0, 1, 0, 0]] * 2) > 0),
            "padding must lie at the left",
        ),
        (lambda: Injection(0, OWN, ~FLAGS, padding=torch.tensor([[1, 0, 0, 0]] * 2) > 0), "where a row is padded"),
        (lambda: aligned(OWN, [OWN[0]], [range(4)] * 2, layer=0), "states for 1 and places for 2"),
        (
            lambda: aligned(OWN, [OWN[0, :2]] * 2, [[0, 1], [1]], layer=0),
            r"row 1: states of shape \(2, 3\) for 1 places",
        ),
        (lambda: aligned(OWN, [OWN[0, :2]] * 2, [[0, 1], [1, 1]], layer=0), "row 1: places must be distinct"),
        (lambda: aligned(OWN, [OWN[0, :1]] * 2, [[0], [4]], layer=0), r"row 1: .* lie in 0..3"),
        (lambda: aligned(OWN, [OWN[0, :1]] * 2, [[-1], [3]], layer=0), r"row 0: .* lie in 0..3"),
        (lambda: last(OWN, OWN[:, 0], layer=0, how="max"), "how 'max': choose one of replace, sum, mean"),
        (lambda: last(OWN, OWN[:1, 0], layer=0), r"state of shape \(1, 3\): give"),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_a_state_that_is_no_number_is_refused_where_it_is_injected() -> None:
    own = OWN.clone()
    own[0, 1] = torch.nan
    assert aligned(own, [OWN[0, :1]] * 2, [[0], [1]], layer=0).replaced.sum() == 2
    with pytest.raises(NonFiniteStateError, match="at layer 3 holds NaN"):
        aligned(OWN, [own[0, 1:2]] * 2, [[0], [1]], layer=3)


# Controls.


def map_of(d_source: int = 6, d_target: int = 6) -> Aligner:
    rng = np.random.default_rng(0)
    shapes = {
        "weight": (d_source, d_target),
        "mean_source": (d_source,),
        "mean_target": (d_target,),
        "control_mean_source": (d_source,),
        "control_mean": (d_target,),
    }
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Aligner(LayerPair("a", (1,), "b", 1), tensors)


def states(name: str, aligner: Aligner, n: int = 40, seed: int = 0, rng_seed: int = 0) -> Any:
    rng = np.random.default_rng(1)
    width = len(aligner.tensors["mean_source"])
    source, other = (rng.normal(size=(n, width)).astype(np.float32) for _ in range(2))
    result = control_states(name, aligner, source, other, np.random.default_rng(rng_seed), seed)
    if not isinstance(result, str):
        assert result.shape == (n, len(aligner.tensors["mean_target"]))
        assert result.dtype == np.float32
    return source, other, result


def test_mean_and_zero_hold_nothing_of_the_source() -> None:
    aligner = map_of()
    np.testing.assert_array_equal(states("mean", aligner)[2], np.tile(aligner.tensors["control_mean"], (40, 1)))
    assert not states("zero", aligner)[2].any()


def test_random_vectors_have_the_mapped_states_length_and_no_direction_of_theirs() -> None:
    aligner = map_of()
    source, _, noise = states("random_norm", aligner, n=4000)
    mapped = aligner.apply(source)
    np.testing.assert_allclose(np.linalg.norm(noise, axis=1), np.linalg.norm(mapped, axis=1), rtol=1e-4)
    cosine = (noise * mapped).sum(1) / np.linalg.norm(mapped, axis=1) ** 2
    assert abs(cosine.mean()) < 0.03
    np.testing.assert_array_equal(noise, states("random_norm", aligner, n=4000)[2])
    assert (noise != states("random_norm", aligner, n=4000, rng_seed=1)[2]).any()


def test_a_random_rotation_keeps_distances_and_follows_its_seed_alone() -> None:
    aligner = map_of()
    source, _, rotated = states("random_rotation", aligner)
    own = source - aligner.tensors["control_mean_source"]
    turned = rotated - aligner.tensors["control_mean"]
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(own, axis=1), rtol=1e-4)
    np.testing.assert_allclose(turned @ turned.T, own @ own.T, atol=1e-4)
    assert np.abs(turned - own).max() > 0.1
    # A rerun is another process, which draws it again.
    evaluate.injection.controls._rotation.cache_clear()
    np.testing.assert_array_equal(rotated, states("random_rotation", aligner, rng_seed=5)[2])
    assert np.abs(rotated - states("random_rotation", aligner, seed=1)[2]).max() > 0.1


def test_shuffled_states_are_mapped_states_of_other_text() -> None:
    aligner = map_of()
    _, other, shuffled = states("shuffled", aligner)
    np.testing.assert_array_equal(shuffled, aligner.apply(other))
    rng = np.random.default_rng(0)
    assert "no other text" in control_states("shuffled", aligner, other, None, rng, 0)


def test_raw_states_need_equal_widths() -> None:
    source, _, raw = states("raw", map_of())
    np.testing.assert_array_equal(raw, source)
    assert states("raw", map_of(6, 8))[2] == "widths differ (6 and 8)"


@pytest.mark.parametrize("name", CONTROLS)
def test_no_positions_give_no_states(name: str) -> None:
    states(name, map_of(), n=0)
    if name != "raw":
        states(name, map_of(6, 8), n=3)
