"""What configurations claim, under whatever name; and that their hashes stay what they were."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from featstore.models.configuration import (
    UNLIMITED,
    claimed_depth,
    claimed_width,
    context_length,
    identity,
    vocabulary,
)
from featstore.runtime.provenance import digest

TEXT = {"hidden_size": 64, "num_hidden_layers": 5, "vocab_size": 70, "max_position_embeddings": 33}


@pytest.mark.parametrize(
    ("kind", "given", "claims"),
    [
        ("llama", TEXT, (5, 64, 70, 33)),
        ("gpt2", {"n_layer": 5, "n_embd": 64, "vocab_size": 70, "n_positions": 33}, (5, 64, 70, 33)),
        ("gemma3", {"text_config": TEXT}, (5, 64, 70, 33)),
        ("mpt", {"n_layers": 5, "d_model": 64, "vocab_size": 70, "max_seq_len": 33}, (5, 64, 70, 33)),
        ("bloom", {"n_layer": 5, "hidden_size": 64, "vocab_size": 70}, (5, 64, 70, UNLIMITED)),
        ("bloom", {"n_layer": 5, "hidden_size": 64, "vocab_size": 70, "seq_length": 33}, (5, 64, 70, 33)),
        ("mamba", {"num_hidden_layers": 5, "hidden_size": 64, "vocab_size": 70}, (5, 64, 70, UNLIMITED)),
        ("recurrent_gemma", {"num_hidden_layers": 5, "hidden_size": 64, "vocab_size": 70}, (5, 64, 70, UNLIMITED)),
        (
            "xlstm",
            {"num_blocks": 5, "num_hidden_layers": 5, "hidden_size": 32, "vocab_size": 70},
            (5, 32, 70, UNLIMITED),
        ),
        # Two attentions a block: the type counts both and names the blocks as well.
        ("longcat_flash", {"num_layers": 5, "hidden_size": 64, "vocab_size": 70}, (5, 64, 70, 131072)),
    ],
)
def test_claims_are_found_under_any_name(kind: str, given: dict[str, Any], claims: tuple[int, ...]) -> None:
    config = CONFIG_MAPPING[kind](**given)
    found = claimed_depth(config), claimed_width(config), vocabulary(config), context_length(config)
    assert found == claims


def test_what_is_not_claimed_is_none() -> None:
    config = CONFIG_MAPPING["blt"]()
    assert claimed_depth(config) is claimed_width(config) is None
    nothing = SimpleNamespace(num_hidden_layers=None, hidden_size=0, vocab_size=True, max_position_embeddings=None)
    nothing.get_text_config = lambda: nothing
    assert claimed_depth(nothing) is claimed_width(nothing) is vocabulary(nothing) is None
    assert context_length(nothing) == UNLIMITED


def test_an_extra_entry_does_not_stand_for_a_declared_one() -> None:
    assert claimed_depth(CONFIG_MAPPING["llama"](**TEXT, num_layers=2)) == 5


@pytest.mark.parametrize("kind", ["bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h"])
def test_configurations_with_infinities_have_a_hash(kind: str) -> None:
    limited = CONFIG_MAPPING[kind](time_step_limit=(0.0, 5.0))
    unlimited = CONFIG_MAPPING[kind](time_step_limit=(0.0, math.inf))
    assert len(digest(identity(unlimited))) == 64
    assert digest(identity(unlimited)) == digest(identity(CONFIG_MAPPING[kind](time_step_limit=(0.0, math.inf))))
    assert digest(identity(limited)) != digest(identity(unlimited))


def test_infinities_are_words_and_all_else_stays() -> None:
    values = {"a": [math.inf, (1, -math.inf)], "b": {"c": math.nan}, "d": None, "e": 1.5, "f": True, "dtype": "x"}
    config = SimpleNamespace(to_dict=lambda: values)
    assert identity(config) == {"a": ["inf", [1, "-inf"]], "b": {"c": "nan"}, "d": None, "e": 1.5, "f": True}


def test_hashes_of_finite_configurations_are_those_of_their_entries() -> None:
    """Stores made before infinities were spelt have these hashes on record."""
    config = CONFIG_MAPPING["llama"](**TEXT)
    left_out = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache")
    values = {key: value for key, value in config.to_dict().items() if key not in left_out}
    assert digest(identity(config)) == digest(values)
    assert json.dumps(identity(config)) == json.dumps(values)
