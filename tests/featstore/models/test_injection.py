"""What a pass with injected states gives, and which injections cannot be meant."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featstore.errors import LayerRangeError, NonFiniteStateError, SpecError
from featstore.models import residual as sites
from featstore.models.injection import COMBINE, Injection, aligned, inject, last
from featstore.models.loading import load_model
from featstore.models.passes import Passes
from featstore.models.probe.prove import Needs, prove
from featstore.models.references import ModelSpec
from featstore.models.stack import ordinary_ids, residual_stream
from tests.support.architectures.building import build as architecture
from tests.support.architectures.kinds import some_ids
from tests.support.tiny_models import small


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
    skipping = replace(stream, skips=frozenset(range(stream.depth + 1)))
    run: list[int] = []
    attention = [block.self_attn for block in stream.blocks]
    handles = [a.register_forward_hook(lambda *_, i=i: run.append(i)) for i, a in enumerate(attention)]
    for layer in range(stream.depth + 1):
        hidden = torch.randn(2, 40, model.config.hidden_size, generator=torch.Generator().manual_seed(layer))
        everywhere = Injection(layer, hidden, torch.ones(hidden.shape[:2], dtype=torch.bool))
        with torch.inference_mode(), inject(stream, everywhere, whole=False):
            slow = model(input_ids=ids, use_cache=False).logits
        run.clear()
        with torch.inference_mode(), inject(skipping, everywhere, whole=True):
            fast = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(fast, slow), layer
        assert run == list(range(layer, stream.depth))
        # What a model was not seen to do without is run.
        assert torch.equal(logits_with(model, ids, layer, hidden, whole=True), slow), layer
        assert run == [*range(layer, stream.depth), *range(stream.depth)]
    for handle in handles:
        handle.remove()


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


@pytest.mark.parametrize(
    "name",
    ["gpt_neox", "bamba", "mamba", "jamba", "lfm2", "rwkv", "openai-gpt", "gemma4_text", "gemma3n_text", "deepseek_v4"],
)
@torch.inference_mode()
def test_a_text_goes_on_from_injected_states_however_a_model_goes_on(name: str) -> None:
    stream = prove(small(name), Needs(continuing=True)).stream
    # Above it there are blocks whose keys, shared or not, and states are made of what is put in.
    layer = 1
    ids, more = ordinary_ids(stream.model, 2, 9, seed=3), ordinary_ids(stream.model, 2, 4, seed=4)

    def said(injection: Injection | None) -> list[torch.Tensor]:
        """Logits of the prompt's end, of a branch, and of four tokens in two passes."""
        with nullcontext() if injection is None else inject(stream, injection, whole=False):
            passes = Passes(stream)
            found = [passes.read(ids)]
            # With the rows of both, so that what is read again is the injection's batch.
            branch = passes.branch(torch.tensor([0, 1]))
            found.append(branch.read(more.flip(1), keep=4))
            return [*found, passes.read(more[:, :3], keep=3), passes.read(more[:, 3:])]

    with sites.watching(stream, [layer]) as states:
        Passes(stream).read(ids)
    own = states[layer]
    everywhere = [own[0], own[1]], [range(9)] * 2
    clean = said(None)
    for injection in (aligned(own, *everywhere, layer=layer), last(own, own[:, -1], layer=layer)):
        first, *later = said(injection)
        assert torch.equal(first, clean[0])
        # Where what was read is read again with more rows beside it, some processors round its products otherwise.
        for found, wanted in zip(later, clean[1:], strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    moved = said(last(own, own[:, -1].flip(0), layer=layer))
    for found, wanted in zip(moved, clean, strict=True):
        assert ((found - wanted).abs().amax(dim=(1, 2)) > 1e-3).all()
    # However what follows is cut.
    whole = last(own, own[:, -1].flip(0), layer=layer)
    with inject(stream, whole, whole=False):
        passes = Passes(stream)
        found = torch.cat([passes.read(ids), passes.read(more, keep=4)], dim=1)
    torch.testing.assert_close(found, torch.cat([moved[0], *moved[2:]], dim=1), rtol=1e-3, atol=1e-4)


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


# Models whose memory is no cache of keys.


@pytest.mark.parametrize("name", ["mamba2", "mamba", "falcon_mamba", "rwkv", "xlstm", "recurrent_gemma", "lfm2"])
def test_a_recurrent_model_goes_on_from_its_own_states_as_it_does_from_its_prompt(name: str) -> None:
    model, ids = architecture(name), some_ids(1, 9, 2)
    stream = prove(model, Needs(continuing=True)).stream
    layer = stream.depth // 2
    more = some_ids(2, 3, 2)
    with torch.inference_mode():
        whole = model(input_ids=torch.cat([ids, more], dim=1), use_cache=False).logits[:, 8:]
    own = sites.capture(stream, ids, [layer])[layer]
    injection = aligned(own, [own[0, [3, 8]], own[1, [5]]], [[3, 8], [5]], layer=layer)
    with torch.inference_mode(), inject(stream, injection, whole=False):
        passes = Passes(stream)
        # A second text begins within the context, after the first one has gone on.
        for _ in range(2):
            read = [passes.read(ids), *(passes.read(more[:, step : step + 1]) for step in range(3))]
            torch.testing.assert_close(torch.cat(read, dim=1), whole, atol=1e-4, rtol=1e-4)
            passes = Passes(stream)
