"""Continuations and their likelihood: transformers' own text, alone or padded, and the true map's text on the twin."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from evaluate.injection.continuing import continue_from, prompt_states, score_continuation
from featstore.errors import SpecError
from featstore.models import residual as sites
from featstore.models.answering import left_padded
from featstore.models.injection import Injection, aligned, last
from featstore.models.layout import Axes
from featstore.models.loading import load_model
from featstore.models.references import ModelSpec
from featstore.models.sampling import Sampling
from featstore.models.stack import residual_stream

NEW = 8
#: Longer than the tiny Mistral's sliding window, shorter, and of one token.
LENGTHS = (33, 12, 1, 26)


@pytest.fixture(scope="module", params=["llama", "mistral", "mistral-eager"])
def model(request: pytest.FixtureRequest, tiny_llama: Path, tiny_mistral: Path) -> Any:
    name, _, attention = request.param.partition("-")
    path = {"llama": tiny_llama, "mistral": tiny_mistral}[name]
    return load_model(ModelSpec(name, str(path)), device="cpu", dtype="float32", attention=attention or "sdpa")


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Any:
    return load_model(ModelSpec("llama", str(tiny_llama)), device="cpu", dtype="float32")


def prompts(model: Any, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(5, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def texts(model: Any, ids: torch.Tensor, **options: Any) -> list[list[int]]:
    stream = residual_stream(model)
    return continue_from(model, ids, **({"stream": stream, "length": NEW, "stops": ()} | options))


def scores(model: Any, ids: torch.Tensor, wanted: Any, **options: Any) -> list[float]:
    return score_continuation(model, ids, wanted, stream=residual_stream(model), **options)


def alone(model: Any, row: list[int], **options: Any) -> list[int]:
    return texts(model, torch.tensor([row]), **options)[0]


def own_of(model: Any, ids: torch.Tensor, layer: int, padding: torch.Tensor | None) -> torch.Tensor:
    return prompt_states(model, residual_stream(model), ids, [layer], padding=padding)[layer]


def test_greedy_text_is_transformers_own(model: Any) -> None:
    for row in prompts(model):
        ids = torch.tensor([row])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            pad_token_id=0,
            eos_token_id=[],
        )
        assert alone(model, row) == output[0, len(row) :].tolist()


def test_left_padding_gives_the_text_of_the_prompt_alone(model: Any) -> None:
    rows = prompts(model)
    ids, padding = left_padded(rows, fill=9)
    assert padding is not None
    assert ids.shape == padding.shape == (4, 33)
    assert [row[~gone].tolist() for row, gone in zip(ids, padding, strict=True)] == rows
    assert (ids[padding] == 9).all()
    single = [alone(model, row) for row in rows]
    assert texts(model, ids, padding=padding) == single
    found = scores(model, ids, single, padding=padding)
    wanted = [scores(model, torch.tensor([row]), [text])[0] for row, text in zip(rows, single, strict=True)]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert left_padded([[1, 2], [3, 4]])[1] is None


def test_padded_states_are_those_of_the_prompt_alone(model: Any) -> None:
    rows, depth = prompts(model), residual_stream(model).depth
    ids, padding = left_padded(rows)
    stream = residual_stream(model)
    states = prompt_states(model, stream, ids, range(depth + 1), padding=padding)
    for i, row in enumerate(rows):
        single = sites.capture(stream, torch.tensor([row]), range(depth + 1))
        for layer, hidden in states.items():
            torch.testing.assert_close(hidden[i, -len(row) :], single[layer][0], rtol=1e-4, atol=1e-4)


def test_rows_do_not_influence_each_other(model: Any) -> None:
    rows = prompts(model)
    one, padding = left_padded(rows)
    assert padding is not None
    two = one.clone()
    two[1] = two[1].flip(0)
    text_one, text_two = (texts(model, ids, padding=padding) for ids in (one, two))
    kept = [0, 2, 3]
    assert [text_one[i] for i in kept] == [text_two[i] for i in kept]
    assert text_one[1] != text_two[1]
    score_one, score_two = (scores(model, ids, text_one, padding=padding) for ids in (one, two))
    assert [score_one[i] for i in kept] == [score_two[i] for i in kept]


def test_own_states_put_back_give_the_same_text_and_likelihood(model: Any) -> None:
    for lengths in ((30, 30), LENGTHS):
        ids, padding = left_padded(prompts(model, lengths))
        clean = texts(model, ids, padding=padding)
        nats = scores(model, ids, clean, padding=padding)
        for layer in range(residual_stream(model).depth + 1):
            own = own_of(model, ids, layer, padding)
            gone = torch.zeros_like(ids, dtype=torch.bool) if padding is None else padding
            places = [np.flatnonzero(~row.numpy()) for row in gone]
            states = [hidden[at] for hidden, at in zip(own, places, strict=True)]
            for injection in (
                aligned(own, states, places, layer=layer, padding=padding),
                last(own, own[:, -1], layer=layer, padding=padding),
                last(own, torch.zeros_like(own[:, -1]), layer=layer, how="sum", padding=padding),
            ):
                # The same bits, so the same sums.
                assert scores(model, ids, clean, injection=injection) == nats
                assert texts(model, ids, injection=injection, padding=padding) == clean


def test_embeddings_in_place_of_another_prompt_are_the_prompt(model: Any) -> None:
    rows = prompts(model)
    ids, padding = left_padded(rows)
    assert padding is not None
    other = torch.full_like(ids, 7)
    own = own_of(model, other, 0, padding)
    states = [model.get_input_embeddings().weight[torch.tensor(row)] for row in rows]
    places = [np.flatnonzero(~row.numpy()) for row in padding]
    clean = texts(model, ids, padding=padding)
    for keep in ("own", "hide"):
        injection = aligned(own, states, places, layer=0, keep=keep, padding=padding)
        assert texts(model, other, injection=injection) == clean
        assert scores(model, other, clean, injection=injection) == scores(model, ids, clean, padding=padding)


def test_hiding_gives_padded_prompts_the_text_they_have_alone(model: Any) -> None:
    rows = prompts(model, (33, 12, 26))
    ids, padding = left_padded(rows)
    other = ids.clone()
    layer, places = 2, [[32, 20], [32, 28, 27], [32, 31]]
    assert padding is not None
    for i, at in enumerate(places):
        # Other prompts of the same lengths, the first word included.
        begin = int(padding[i].sum())
        other[i, begin:] = other[i, begin:].flip(0)
        assert other[i, begin] != ids[i, begin]
        assert min(at) > begin
    width = model.config.hidden_size
    states = [torch.randn(len(at), width, generator=torch.Generator().manual_seed(i)) for i, at in enumerate(places)]
    results = []
    for prompt in (ids, other):
        own = own_of(model, prompt, layer, padding)
        injection = aligned(own, states, places, layer=layer, keep="hide", padding=padding)
        results.append(texts(model, prompt, injection=injection))
        nats = scores(model, prompt, results[0], injection=injection)
        for i, row in enumerate(prompt):
            short = row[~padding[i]][None]
            shift = 33 - short.shape[1]
            single = aligned(
                own_of(model, short, layer, None),
                [states[i]],
                [[p - shift for p in places[i]]],
                layer=layer,
                keep="hide",
            )
            assert texts(model, short, injection=single)[0] == results[-1][i]
            np.testing.assert_allclose(scores(model, short, [results[0][i]], injection=single)[0], nats[i], atol=1e-4)
    assert results[0] == results[1]


def test_the_text_is_the_one_of_highest_likelihood_step_by_step(model: Any) -> None:
    ids, padding = left_padded(prompts(model))
    own = own_of(model, ids, 1, padding)
    for injection in (None, last(own, own.flip(0)[:, -1], layer=1, padding=padding, keep="hide")):
        text = texts(model, ids, injection=injection, padding=padding)
        best = scores(model, ids, text, injection=injection, padding=padding)
        for step in (0, 3, NEW - 1):
            other = [list(row) for row in text]
            for row in other:
                row[step] = row[step] + 1 if row[step] < 100 else row[step] - 1
            upto = [row[: step + 1] for row in other], [row[: step + 1] for row in text]
            worse, good = (scores(model, ids, rows, injection=injection, padding=padding) for rows in upto)
            assert all(w > g for w, g in zip(worse, good, strict=True)), step
        assert all(np.isfinite(best))


def test_likelihood_is_that_of_one_pass_over_everything(model: Any) -> None:
    rows = prompts(model, (20, 20))
    wanted = prompts(model, (9, 4))
    found = scores(model, torch.tensor(rows), wanted)
    for row, more, nats in zip(rows, wanted, found, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row + more]), use_cache=False).logits[0]
        share = torch.log_softmax(logits.double(), dim=-1)[len(row) - 1 : -1]
        np.testing.assert_allclose(nats, -float(share[range(len(more)), more].mean()), rtol=1e-4)
    assert scores(model, torch.tensor(rows), [wanted[0][:1], wanted[1][:1]]) != found


def test_a_stop_ends_its_own_row_and_is_kept(llama: Any) -> None:
    ids, padding = left_padded(prompts(llama))
    full = texts(llama, ids, padding=padding)
    stop = full[1][2]
    assert texts(llama, ids, padding=padding, stops={stop}) == [
        row[: row.index(stop) + 1] if stop in row else row for row in full
    ]
    assert texts(llama, ids[1:2], padding=padding[1:2], stops={full[1][0]}, length=5) == [full[1][:1]]
    assert [len(row) for row in texts(llama, ids, padding=padding, length=1)] == [1] * 4


# Sampling.


def test_draws_are_fixed_by_seed_row_and_step_alone(llama: Any) -> None:
    rows = prompts(llama)
    ids, padding = left_padded(rows)
    sample = Sampling(temperature=1.5, seed=4)
    together = texts(llama, ids, padding=padding, sample=sample)
    assert together == [alone(llama, row, sample=sample, rows=[i]) for i, row in enumerate(rows)]
    assert alone(llama, rows[1], sample=sample) != together[1]
    assert texts(llama, ids, padding=padding, sample=Sampling(temperature=1.5, seed=5)) != together
    same = texts(llama, torch.tensor([rows[0]] * 3), sample=sample)
    assert len({tuple(row) for row in same}) == 3
    short = texts(llama, ids, padding=padding, sample=sample, length=3)
    assert short == [row[:3] for row in together]


@pytest.mark.parametrize("sample", [Sampling(temperature=1e-4), Sampling(top_p=1e-9, temperature=3.0)])
def test_the_coldest_and_narrowest_draw_is_the_greedy_one(llama: Any, sample: Sampling) -> None:
    ids, padding = left_padded(prompts(llama))
    assert texts(llama, ids, padding=padding, sample=sample) == texts(llama, ids, padding=padding)


@pytest.mark.parametrize(
    ("sample", "wanted"),
    [
        (Sampling(), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(top_p=0.8), [0.625, 0.375, 0, 0]),
        (Sampling(top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (Sampling(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(sample: Sampling, wanted: list[float]) -> None:
    class Fixed(torch.nn.Module):
        """Logits of known probabilities whatever it reads; the likeliest token is not the first."""

        config = SimpleNamespace(get_text_config=SimpleNamespace)

        def __init__(self) -> None:
            super().__init__()
            self.decoder = torch.nn.Linear(1, 1)

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            logits = torch.log(torch.tensor([0.15, 0.5, 0.05, 0.3]))
            return SimpleNamespace(logits=logits.expand(*input_ids.shape, 4), past_key_values=None)

    model = Fixed()
    blocks, axes = torch.nn.ModuleList(), Axes(0, 1, (1,))
    stream = sites.ResidualStream(model, model.decoder, blocks, "decoder", axes, torch.float32)
    rows = continue_from(
        model, torch.zeros((400, 1), dtype=torch.long), stream=stream, length=10, stops=(), sample=sample
    )
    # Every step draws anew.
    assert sum(len(set(row)) > 1 for row in rows) > 300
    share = np.bincount(np.concatenate(rows), minlength=4)[[1, 3, 0, 2]] / 4000
    np.testing.assert_allclose(share, wanted, atol=0.03)
    assert (share[np.array(wanted) == 0] == 0).all()


# The demo pair.


@pytest.fixture(scope="module")
def twins(demo_models: SimpleNamespace) -> SimpleNamespace:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    source, target = (
        load_model(ModelSpec("m", str(path)), device="cpu", dtype="float32")
        for path in (demo_models.smollm2, demo_models.twin_same)
    )
    rotation = load_file(demo_models.twin_same / "rotation.safetensors")["Q"]
    tokenizer = AutoTokenizer.from_pretrained(demo_models.smollm2)
    ids, padding = left_padded(
        [tokenizer(text)["input_ids"] for text in ("The capital of France is", "Water boils at a temperature of about")]
    )
    clean = texts(target, ids, padding=padding)
    nats = scores(target, ids, clean, padding=padding)
    return SimpleNamespace(
        source=source, target=target, rotation=rotation, ids=ids, padding=padding, clean=clean, nats=nats
    )


@pytest.mark.demo_pair
@pytest.mark.parametrize("layer", [0, 15, 30])
def test_the_true_rotation_gives_the_targets_own_text(twins: SimpleNamespace, layer: int) -> None:
    ids, padding = twins.ids, twins.padding
    own = own_of(twins.target, ids, layer, padding)
    there = own_of(twins.source, ids, layer, padding).double() @ twins.rotation.double()
    places = [np.flatnonzero(~row.numpy()) for row in padding]
    states = [hidden[at].float() for hidden, at in zip(there, places, strict=True)]
    clean = twins.clean
    mapped = aligned(own, states, places, layer=layer, padding=padding)
    assert texts(twins.target, ids, injection=mapped) == clean
    nats = scores(twins.target, ids, clean, injection=mapped, padding=padding)
    np.testing.assert_allclose(nats, twins.nats, atol=2e-3)
    wrong = aligned(own, [-hidden for hidden in states], places, layer=layer, padding=padding)
    assert min(scores(twins.target, ids, clean, injection=wrong)) > max(nats) + 0.1
    if layer == 0:
        hidden = Injection(0, mapped.hidden, mapped.replaced, "hide", padding)
        assert texts(twins.target, ids, injection=hidden) == clean


# What is refused.


def test_a_prompt_that_exceeds_the_context_is_refused(llama: Any) -> None:
    ids = torch.full((1, 1020), 7)
    with pytest.raises(SpecError, match="a prompt of 1020 tokens with 5 new ones exceeds the context of 1024; shorten"):
        texts(llama, ids, length=5)
    with pytest.raises(SpecError, match="with 5 new ones"):
        scores(llama, ids, [[7] * 5])
    assert len(alone(llama, [7] * 1020, length=4)) == 4
    # Padding takes no place in the context.
    gone = torch.arange(1030)[None] < 20
    assert len(texts(llama, torch.full((1, 1030), 7), padding=gone, length=4)[0]) == 4


def test_a_last_token_that_has_read_the_prompt_cannot_be_hidden_from(llama: Any) -> None:
    ids = torch.tensor(prompts(llama, (10, 10)))
    own = own_of(llama, ids, 1, None)
    states = [own[0, [9]], own[1, [8]]]
    injection = aligned(own, states, [[9], [8]], layer=1, keep="hide")
    for call in (lambda: texts(llama, ids, injection=injection), lambda: scores(llama, ids, ids, injection=injection)):
        with pytest.raises(SpecError, match="row 1: the prompt's last token took no state"):
            call()
    assert texts(llama, ids, injection=aligned(own, states, [[9], [8]], layer=1))
    # A prompt of one token goes on as the start token does, whatever word it was.
    start = aligned(own[:, :1], [own[0, :0]] * 2, [[], []], layer=1, keep="hide")
    neutral = torch.full_like(ids[:, :1], residual_stream(llama).start)
    assert texts(llama, ids[:, :1], injection=start) == texts(llama, neutral)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length 0"),
        ({"ids": torch.zeros(3, dtype=torch.long)}, r"ids of shape \(3,\)"),
        ({"ids": torch.zeros((2, 0), dtype=torch.long)}, r"ids of shape \(2, 0\)"),
        ({"padding": torch.ones((2, 4), dtype=torch.bool)}, "leave it a token"),
        ({"padding": torch.zeros((2, 3), dtype=torch.bool)}, r"give bool of shape \(2, 4\)"),
        ({"rows": [0]}, r"row numbers \[0\] for 2 rows"),
        ({"rows": [0, -1]}, "0 or more"),
    ],
)
def test_what_cannot_be_continued_is_refused(llama: Any, options: dict[str, Any], message: str) -> None:
    ids = options.pop("ids", torch.full((2, 4), 7))
    with pytest.raises(SpecError, match=message):
        texts(llama, ids, **options)


def test_an_injection_must_be_the_prompts(llama: Any) -> None:
    ids = torch.full((2, 4), 7)
    own = own_of(llama, ids, 0, None)
    padding = torch.tensor([[True, False, False, False], [False] * 4])
    with pytest.raises(SpecError, match=r"ids of shape \(2, 3\) and an injection for \(2, 4\)"):
        texts(llama, ids[:, :3], injection=last(own, own[:, -1], layer=0))
    with pytest.raises(SpecError, match="padded otherwise"):
        texts(llama, ids, injection=last(own, own[:, -1], layer=0), padding=padding)
    with pytest.raises(SpecError, match="padded otherwise"):
        texts(llama, ids, injection=last(own, own[:, -1], layer=0, padding=padding), padding=~padding & False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampling(temperature=0), "temperature 0: must be above 0"),
        (lambda: Sampling(temperature=float("nan")), "temperature nan"),
        (lambda: Sampling(top_p=0), "top_p 0"),
        (lambda: Sampling(top_p=1.1), "top_p 1.1"),
        (lambda: Sampling(seed=-1), "seed -1"),
        (lambda: left_padded([]), "without tokens"),
        (lambda: left_padded([[1], []]), "without tokens"),
    ],
)
def test_values_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


@pytest.mark.parametrize("wanted", [[], [[1], []], [[1]], [[1]] * 3])
def test_every_row_needs_a_continuation_to_be_scored(llama: Any, wanted: list[list[int]]) -> None:
    with pytest.raises(SpecError, match=r"without tokens has no likelihood|continuations for 2 rows"):
        scores(llama, torch.full((2, 4), 7), wanted)
