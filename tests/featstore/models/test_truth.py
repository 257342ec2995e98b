"""Where the stream of every type is: two statements that know nothing of each other agree."""

from __future__ import annotations

import pytest
import torch

from tests.support.architectures.building import NotBuiltError, build, causal_types, variants
from tests.support.architectures.kinds import some_ids
from tests.support.tiers import tiered
from tests.support.truth import (
    NoRowsError,
    counts_left_padding,
    counts_length,
    counts_neighbours,
    decoding_error,
    depends_on_position,
    expected_rows,
    last_arrival,
    looks_ahead,
    refuted,
    swap_leaks,
    transformers_rows,
)

TYPES = [*(listed.name for listed in causal_types()), *variants()]
#: One for each place and shape of the stream, and those without.
QUICK = (
    "llama", "gpt2", "gpt_neox", "opt", "opt@350m", "bloom", "mpt", "mamba", "rwkv", "xlstm", "gemma3", "gemma3n_text",
    "deepseek_v4", "qwen4_exp_text", "inkling2_text", "openai-gpt", "bert", "bart",
    "blt", "cpmant", "hrm_text", "mllama", "prophetnet", "reformer", "xlm", "xlnet",
)  # fmt: skip
#: Far above rounding in float32, far below what any of these models does that is no rounding.
ROUNDING = 1e-4
IDS = some_ids(1, 24, 2)


@pytest.mark.parametrize("name", tiered(QUICK, [name for name in TYPES if name not in QUICK]))
def test_a_plain_hook_and_transformers_own_states_agree_or_there_are_no_rows(name):
    try:
        model = build(name)
    except NotBuiltError:
        pytest.skip("cannot be built")
    try:
        rows = expected_rows(model, name, IDS)
    except NoRowsError:
        assert refuted(model, name, IDS)
        return
    shown = transformers_rows(model, name, IDS)
    assert len(shown) >= len(rows) - 2
    for layer, states in shown.items():
        assert torch.equal(rows[layer], states), layer
    last = last_arrival(model, name, IDS)
    assert last is None or torch.equal(rows[max(rows)], last)


def test_a_stack_that_is_plain_cannot_be_refuted():
    assert refuted(build("llama"), "llama", IDS) == ""


def test_several_streams_stand_end_to_end_in_a_row():
    for name, axes in {"deepseek_v4": (0, 1, 2), "gemma3n_text": (1, 2, 0)}.items():
        model = build(name)
        with torch.inference_mode():
            shown = model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states[2]
        row = expected_rows(model, name, IDS)[2][1, 17]
        # The streams of token 17 of the second text, one after the other.
        streams = shown.permute(*axes, 3)[1, 17]
        assert torch.equal(row, torch.cat([streams[stream] for stream in range(4)]))
    assert expected_rows(build("qwen4_exp_text"), "qwen4_exp_text", IDS)[1].shape == (2, 24, 4 * 64)


@pytest.mark.parametrize(
    ("name", "clean", "leaking"),
    [
        ("llama", range(5), ()),
        ("mamba2", range(5), ()),
        ("gpt2", range(5), ()),
        ("deepseek_v4@scored", range(5), ()),
        # Experts chosen by token id in the first two blocks.
        ("deepseek_v4", (2, 3, 4), (0, 1)),
        # Embeddings given to every block; after the last, nothing is left to be known.
        ("gemma3n_text", (6,), range(6)),
        # The last two of six blocks read keys of earlier ones.
        ("gemma4_unified_text", (0, 1, 2, 6), (3, 4, 5)),
        # Its last module attends to the states after every block.
        ("inkling2_text", (), range(5)),
    ],
)
def test_the_swap_shows_what_goes_around_the_stream(name, clean, leaking):
    leaks = swap_leaks(build(name), name, IDS, some_ids(2, 24, 2))
    assert {layer: leaks[layer] for layer in clean} == dict.fromkeys(clean, 0.0)
    assert all(leaks[layer] > 0.05 for layer in leaking), leaks


@pytest.mark.parametrize(
    ("name", "ahead", "length", "left"),
    [
        ("llama", False, False, False),
        ("gemma3", False, False, False),
        ("llama@bidirectional", True, True, False),
        ("gemma3_text@bidirectional", True, True, False),
        # Its rotary factors are chosen by the longest sequence.
        ("phi3@longrope", False, True, False),
        # Both compress blocks of positions, counted from the start of the padded text.
        ("deepseek_v4", False, False, True),
        ("minimax_m3_vl_text", False, False, True),
    ],
)
def test_what_a_row_depends_on_beside_its_past(name, ahead, length, left):
    model = build(name)
    assert (max(looks_ahead(model, name, IDS, 13).values()) > ROUNDING) == ahead
    assert (max(counts_length(model, name, IDS, 13).values()) > ROUNDING) == length
    assert (max(counts_left_padding(model, name, IDS, 5).values()) > ROUNDING) == left
    assert max(counts_neighbours(model, name, IDS).values()) < ROUNDING


def test_what_enters_the_first_block_depends_on_position_where_positions_are_added_to_it():
    assert depends_on_position(build("llama"), "llama") == 0
    assert depends_on_position(build("gpt2"), "gpt2") > 0.1


def test_generate_agrees_with_plain_passes():
    for name in ("llama", "gpt_neox", "mamba2", "gemma3"):
        assert decoding_error(build(name), IDS) < ROUNDING
