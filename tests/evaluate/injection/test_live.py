"""States put into passes of somebody else: the same bits as `inject`, any gradient mode, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluate.injection.continuing import continue_from, prompt_states
from evaluate.injection.live import LiveInjection, Placed
from featstore.errors import LayerRangeError, NonFiniteStateError, SpecError
from featstore.models import residual as sites
from featstore.models.answering import left_padded
from featstore.models.injection import aligned, inject
from featstore.models.loading import load_model
from featstore.models.references import ModelSpec
from featstore.models.stack import residual_stream

PLACES = ([0, 3, 39], [1, 2])


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request: pytest.FixtureRequest, tiny_llama: Path, tiny_mistral: Path) -> Any:
    path = {"llama": tiny_llama, "mistral": tiny_mistral}[request.param]
    return load_model(ModelSpec(request.param, str(path)), device="cpu", dtype="float32")


@pytest.fixture
def ids(model: Any) -> torch.Tensor:
    return torch.randint(5, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))


def placed(layer: int, states: Any, places: Any = PLACES, keep: str = "own") -> Placed:
    return Placed(layer, tuple(states), tuple(np.array(at, dtype=np.int64) for at in places), keep)


def live(model: Any, *args: Any, **options: Any) -> LiveInjection:
    return LiveInjection(residual_stream(model), placed(*args, **options))


def noise(model: Any, places: Any = PLACES, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(at), model.config.hidden_size, generator=generator) for at in places]


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("keep", ["own", "hide"])
@pytest.mark.parametrize("cache", [True, False])
def test_the_logits_are_those_of_a_prepared_injection_to_the_bit(
    model: Any, ids: torch.Tensor, keep: str, cache: bool
) -> None:
    stream, states = residual_stream(model), noise(model)
    begun = ids.clone()
    begun[:, 0] = stream.start
    new = ids[:, 5:8]
    for rows in (ids, begun):
        for layer, own in sites.capture(stream, rows, range(stream.depth + 1)).items():
            prepared = aligned(own, states, PLACES, layer=layer, keep=keep)
            with torch.inference_mode():
                with inject(stream, prepared, whole=not cache):
                    wanted = model(input_ids=rows, use_cache=cache)
                    after = model(input_ids=new, past_key_values=wanted.past_key_values).logits if cache else None
                with live(model, layer, states, keep=keep) as injection:
                    found = model(input_ids=rows, use_cache=cache)
                    later = model(input_ids=new, past_key_values=found.past_key_values).logits if cache else None
            # A prepared injection's own states had read the first word, which `hide` takes out of the live pass.
            reading = torch.ones_like(prepared.replaced)
            if keep == "hide" and rows is ids:
                reading = prepared.replaced | prepared.start
            assert torch.equal(found.logits[reading], wanted.logits[reading]), layer
            assert cache == (after is not None)
            assert after is None or torch.equal(after, later), layer
            assert injection.passes == 1
    assert hooks(model) == 0


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_models_own_states_change_no_bit(
    model: Any, ids: torch.Tensor, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    stream = residual_stream(model)
    for rows in (ids, ids[:1]):
        with mode():
            clean = model(rows).logits
        for layer, own in sites.capture(stream, rows, range(stream.depth + 1)).items():
            places = PLACES[: len(rows)]
            states = [own[row, at].clone() for row, at in enumerate(places)]
            with mode(), live(model, layer, states, places):
                assert torch.equal(model(rows).logits, clean), layer
        with mode():
            assert torch.equal(model(rows).logits, clean)


def test_every_pass_takes_them_and_positions_may_count_from_the_end(model: Any, ids: torch.Tensor) -> None:
    state = noise(model, [[0]])
    with torch.no_grad():
        with live(model, 1, state, [[-1]]) as injection:
            long, short = model(ids[:1]).logits, model(ids[:1, :7]).logits
        assert injection.passes == 2
        for tokens, found in ((40, long), (7, short)):
            with live(model, 1, state, [[tokens - 1]]):
                assert torch.equal(model(ids[:1, :tokens]).logits, found)


def test_every_pass_of_a_context_hides(model: Any, ids: torch.Tensor) -> None:
    new = ids[:, 5:8]

    def answers(rows: torch.Tensor) -> torch.Tensor:
        past = model(input_ids=rows, use_cache=True).past_key_values
        return model(input_ids=new, past_key_values=past).logits

    places = ([3, 39], [2, 39])
    states = noise(model, places)
    with torch.no_grad():
        alone = []
        for rows in (ids, ids[:, 20:]):
            with live(model, 1, states, ([3, -1], [2, -1]), keep="hide"):
                alone.append(answers(rows))
        with live(model, 1, states, ([3, -1], [2, -1]), keep="hide") as injection:
            together = [answers(rows) for rows in (ids, ids[:, 20:], ids)]
    assert injection.passes == 3
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])
    assert torch.equal(together[2], alone[0])


def test_the_model_is_as_it_was_after_an_error(model: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        clean = model(ids).logits
        with pytest.raises(RuntimeError, match="size mismatch"), live(model, 1, noise(model), keep="hide") as injection:
            torch.zeros(2, 3, 4, 5) @ model(ids).logits[0, 0]
        assert injection.passes == 1
        with pytest.raises(SpecError, match="the pass has 1 prompts"), live(model, 1, noise(model), keep="hide"):
            model(ids[:1])
        assert hooks(model) == 0
        assert torch.equal(model(ids).logits, clean)


def test_gradients_reach_the_states_and_the_blocks_below(model: Any, ids: torch.Tensor) -> None:
    states = [each.requires_grad_() for each in noise(model)]
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    with live(model, 1, states):
        model(inputs_embeds=embeddings).logits.square().sum().backward()
    for each in states:
        assert each.grad is not None
        assert each.grad.abs().min(dim=1).values.max() > 0
    # What is replaced at layer 1 in row 0 was read by others only at layer 0, in the block below.
    with live(model, 0, states):
        embeddings.grad = None
        model(inputs_embeds=embeddings).logits.square().sum().backward()
    assert embeddings.grad is not None
    assert not embeddings.grad[0, PLACES[0]].any()
    assert embeddings.grad[0, 1].any()


@pytest.mark.parametrize("keep", ["own", "hide"])
def test_text_goes_on_from_them(model: Any, ids: torch.Tensor, keep: str) -> None:
    stream = residual_stream(model)
    rows = [ids[0, :12].tolist(), ids[1, :9].tolist()]
    prompts, padding = left_padded(rows)
    assert padding is not None
    # With `hide` the last token, out of which the text goes on, takes a state.
    places, states = ([2, 11], [5, 11]), noise(model, ([0] * 2, [0] * 2))
    own = prompt_states(model, stream, prompts, [2], padding=padding)[2]
    injection = aligned(own, states, places, layer=2, keep=keep, padding=padding)
    wanted = continue_from(model, prompts, injection=injection, stream=stream, length=5, stops=())
    with live(model, 2, states, places, keep=keep) as context:
        found = model.generate(
            prompts,
            attention_mask=(~padding).long(),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
        )
    assert context.passes == 1
    # transformers forbids stop tokens below `min_new_tokens`; ours were let run on.
    stops = set(np.atleast_1d(model.generation_config.eos_token_id).tolist())
    assert not stops & {token for row in wanted for token in row}
    assert found[:, prompts.shape[1] :].tolist() == wanted
    with torch.no_grad():
        clean = model.generate(
            prompts, attention_mask=(~padding).long(), max_new_tokens=5, do_sample=False, pad_token_id=0
        )
    assert found.tolist() != clean.tolist()


def test_padding_at_the_right_takes_no_state_and_changes_no_other(model: Any, ids: torch.Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    # In float64, where another shape of the batch changes next to nothing.
    model = deepcopy(model).double()
    states = noise(model)
    for keep in ("own", "hide"):
        with torch.no_grad():
            with live(model, 1, states, keep=keep):
                both = model(ids, attention_mask=mask).logits
            with live(model, 1, states[1:], PLACES[1:], keep=keep):
                alone = model(ids[1:, :10]).logits
        torch.testing.assert_close(both[1:, :10], alone, rtol=1e-9, atol=1e-9)
    with (
        pytest.raises(SpecError, match="prompt 1: a state is placed on padding"),
        live(model, 1, noise(model, ([0], [10])), ([0], [10])),
    ):
        model(ids, attention_mask=mask)


def test_contexts_at_two_layers_go_together(model: Any, ids: torch.Tensor) -> None:
    first, second = noise(model, seed=1), noise(model, seed=2)
    with torch.no_grad():
        with live(model, 2, second):
            alone = model(ids).logits
        with live(model, 1, first) as below, live(model, 2, second):
            both = model(ids).logits
    assert below.passes == 1
    assert not torch.equal(alone, both)
    assert hooks(model) == 0


@pytest.mark.parametrize("outer", ["own", "hide"])
def test_a_start_is_the_models_own_inside_of_another_context(model: Any, ids: torch.Tensor, outer: str) -> None:
    # A prompt of one row with a state at its last place: a pass of one token would take it, too.
    rows, first, second = ids[:1], noise(model, [[0]], seed=1), noise(model, [[0]], seed=2)
    stream = residual_stream(model)
    with torch.no_grad():
        with live(model, 1, first, [[-1]], keep=outer) as below, live(model, 2, second, [[-1]], keep="hide") as above:
            assert above._neutral is not None
            assert torch.equal(above._neutral, stream.start_state(2))
            model(rows)
        assert (below.passes, above.passes) == (1, 1)
        # Where a pass is prepared while somebody injects.
        own = torch.zeros(1, 40, model.config.hidden_size)
        prepared = aligned(own, second, [[39]], layer=2, keep="hide")
        with live(model, 1, first, [[-1]], keep=outer) as below:
            again = residual_stream(model)
            with inject(again, prepared, whole=False):
                pass
            assert torch.equal(again.start_state(2), stream.start_state(2))
            assert below.passes == 0
            model(rows)
    assert hooks(model) == 0


def test_a_cache_from_outside_is_refused(model: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        past = model(ids[:, :5], use_cache=True).past_key_values
        with live(model, 1, noise(model)), pytest.raises(SpecError, match="goes on from 5 cached tokens"):
            model(ids[:, 5:], past_key_values=past)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([[40], [0]], r"prompt 0: position 40 is outside its 40 tokens; give 0..39, or -40..-1 from the end"),
        ([[0], [-41]], "prompt 1: position -41 is outside"),
        ([[0], [39, -1]], "prompt 1: a position is named twice"),
        ([[0]], r"the pass has 2 prompts, states were given for 1"),
    ],
)
def test_positions_that_a_pass_does_not_have_are_refused(
    model: Any, ids: torch.Tensor, places: list[list[int]], message: str
) -> None:
    with torch.no_grad(), live(model, 1, noise(model, places), places), pytest.raises(SpecError, match=message):
        model(ids)
    assert hooks(model) == 0


def test_what_cannot_be_injected_is_refused_before_a_pass(model: Any) -> None:
    depth, width = len(residual_stream(model).blocks), model.config.hidden_size
    with pytest.raises(LayerRangeError, match=rf"layer {depth + 1}, outside 0..{depth} of this model"):
        live(model, depth + 1, noise(model))
    with pytest.raises(SpecError, match=rf"prompt 0: states of width 7 for a model of width {width}"):
        live(model, 1, [torch.zeros(1, 7)], [[0]])
    with pytest.raises(SpecError, match="keep 'none': choose one of own, hide"):
        live(model, 1, noise(model), keep="none")
    with pytest.raises(SpecError, match=r"prompt 1: states of shape \(2, \d+\) for 1 positions"):
        live(model, 1, noise(model), [PLACES[0], [1]])
    with pytest.raises(SpecError, match="states for 2 prompts and positions for 1"):
        live(model, 1, noise(model), PLACES[:1])


def test_the_first_word_is_hidden_from_what_reads_the_states(model: Any, ids: torch.Tensor) -> None:
    other, states = ids.clone(), noise(model, ([3, 20], [2, 20]))
    other[:, 0] += 1
    for layer in range(residual_stream(model).depth + 1):
        found = []
        with torch.no_grad():
            for rows in (ids, other):
                # As token ids and as their embeddings.
                for given in ({"input_ids": rows}, {"inputs_embeds": model.get_input_embeddings()(rows)}):
                    with live(model, layer, states, ([3, 20], [2, 20]), keep="hide"):
                        output = model(**given, use_cache=True)
                        after = model(input_ids=ids[:, :2], past_key_values=output.past_key_values).logits
                    found.append(torch.cat([output.logits[:, [0, 20]], after], dim=1))
        assert all(torch.equal(found[0], each) for each in found[1:]), layer


def test_attention_without_a_mask_of_positions_cannot_hide(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual_stream(model).decoder.config, "_attn_implementation", "flash_attention_2")
    live(model, 1, noise(model))
    with pytest.raises(SpecError, match="'flash_attention_2' takes no mask of positions"):
        live(model, 1, noise(model), keep="hide")


def test_a_state_that_is_no_number_is_refused(model: Any, ids: torch.Tensor) -> None:
    states = noise(model)
    states[1][0, 0] = torch.nan
    with torch.no_grad(), live(model, 1, states), pytest.raises(NonFiniteStateError, match="at layer 1"):
        model(ids)


def test_a_context_that_no_pass_used_warns_and_is_entered_once_at_a_time(model: Any, ids: torch.Tensor) -> None:
    with pytest.warns(UserWarning, match="no pass took the states"), live(model, 1, noise(model)):
        pass
    injection = live(model, 1, noise(model))
    for _ in range(2):
        with torch.no_grad(), injection:
            model(ids)
            with pytest.raises(SpecError, match="entered already"), injection:
                pass
        assert injection.passes == 1
    assert repr(injection) == "LiveInjection(layer at layer 1, 3, 2 positions, keep='own', passes=1)"
