"""What people type: every accepted form gives its value, every other a SpecError that quotes it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import FeatstoreError, LayerRangeError, SpecError
from featstore.models.references import (
    DEFAULT_LAYERS,
    DEFAULT_MODELS,
    ModelSpec,
    parse_layers,
    parse_model,
    parse_models,
)
from featstore.runtime.quantities import parse_budget, parse_bytes

NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9.-]|_(?!_)){0,12}", fullmatch=True)


class TestModel:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("llama=meta-llama/Llama-3.1-8B", ModelSpec("llama", "meta-llama/Llama-3.1-8B")),
            ("a=o/r@v1.0", ModelSpec("a", "o/r", "v1.0")),
            ("a=o/r@refs/pr/1", ModelSpec("a", "o/r", "refs/pr/1")),
            ("a=/data/m@home", ModelSpec("a", "/data/m@home")),
            ("a=./m@home", ModelSpec("a", "./m@home")),
            ("a=~/m@home", ModelSpec("a", "~/m@home")),
            ("a=dir=with=equals", ModelSpec("a", "dir=with=equals")),
            ("a-b.c_1=x.gguf", ModelSpec("a-b.c_1", "x.gguf")),
        ],
    )
    def test_forms(self, text, expected):
        assert parse_model(text) == expected

    @pytest.mark.parametrize("text", ["", "llama", "=ref", "a=", "a=@main", "a=o/r@"])
    def test_incomplete_forms_are_quoted(self, text):
        with pytest.raises(SpecError, match=re.escape(repr(text.partition("=")[0]) if text == "=ref" else repr(text))):
            parse_model(text)

    @pytest.mark.parametrize(
        "name", ["..", ".hidden", "-x", "_x", "a/b", "a b", "a__b", "é", "a\n", "a\x00", "a\\b", "a" * 101]
    )
    def test_a_name_that_is_no_safe_path_is_refused(self, name):
        with pytest.raises(SpecError, match="model name"):
            parse_model(f"{name}=ref")

    @given(NAMES, st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda ref: "@" not in ref))
    def test_name_and_reference_come_back(self, name, ref):
        assert parse_model(f"{name}={ref}") == ModelSpec(name, ref)

    @given(st.text())
    def test_any_text_is_parsed_or_refused_with_our_error(self, text):
        try:
            spec = parse_model(text)
        except SpecError:
            return
        assert spec.ref
        assert "/" not in spec.name
        assert "__" not in spec.name

    def test_a_repeated_name_is_refused(self):
        with pytest.raises(SpecError, match="'a' is given twice"):
            parse_models(["a=x", "b=y", "a=z"])

    def test_order_is_kept(self):
        assert [spec.name for spec in parse_models(["b=x", "a=y"])] == ["b", "a"]
        assert [spec.name for spec in parse_models(DEFAULT_MODELS)] == ["llama", "mistral"]


class TestBudget:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("1", 1),
            ("1000000", 1_000_000),
            ("200k", 200_000),
            ("1M", 1_000_000),
            ("1.5m", 1_500_000),
            ("2G", 2_000_000_000),
            ("2b", 2_000_000_000),
            ("10 k", 10_000),
            ("all", None),
        ],
    )
    def test_forms(self, text, expected):
        assert parse_budget(text) == expected

    @pytest.mark.parametrize("text", ["", "0", "0.5", "-1", "1e6", "many", "ALL", "1kk", "k", "nan", "inf", "1,000"])
    def test_anything_else_is_quoted(self, text):
        with pytest.raises(SpecError, match=re.escape(f"token budget {text!r}")):
            parse_budget(text)

    @given(st.integers(1, 10**9))
    def test_decimal_fractions_are_exact(self, tokens):
        assert parse_budget(f"{tokens // 1000}.{tokens % 1000:03d}k") == tokens or tokens == 0

    @given(st.one_of(st.text(), st.from_regex(r"[0-9]{1,400}(\.[0-9]{0,9})?[kMG]?", fullmatch=True)))
    def test_any_text_is_a_positive_number_or_our_error(self, text):
        try:
            value = parse_budget(text)
        except SpecError:
            return
        assert value is None or value >= 1


class TestLayers:
    def test_one_value_serves_every_model_and_is_sorted(self):
        assert parse_layers(["8,0,8, 4"], {"a": 8, "b": 12}) == {"a": (0, 4, 8), "b": (0, 4, 8)}
        assert parse_layers([DEFAULT_LAYERS], {"a": 32}) == {"a": (0, 8, 16, 24, 32)}

    def test_a_models_own_value_wins_wherever_it_stands(self):
        for texts in (["0,1", "b=2"], ["b=2", "0,1"]):
            assert parse_layers(texts, {"a": 8, "b": 12}) == {"a": (0, 1), "b": (2,)}

    @pytest.mark.parametrize(
        ("depth", "expected"), [(30, (0, 8, 15, 23, 30)), (32, (0, 8, 16, 24, 32)), (1, (0, 1)), (2, (0, 1, 2))]
    )
    def test_percent_rounds_half_up(self, depth, expected):
        assert parse_layers(["0%,25%,50%,75%,100%"], {"m": depth}) == {"m": expected}

    def test_a_layer_too_deep_proposes_the_last_one_and_percentages(self):
        with pytest.raises(LayerRangeError, match=r"layer 32 is outside 0\.\.30 of model 'm'.*use 30.*25%") as caught:
            parse_layers(["0,32"], {"m": 30})
        assert isinstance(caught.value, IndexError)

    @pytest.mark.parametrize("text", ["", "0,", "-1", "x", "1.5", "50 %%", "0-3", "9" * 5000])
    def test_what_is_no_layer_is_refused(self, text):
        with pytest.raises(SpecError, match=r"write numbers such as 0,8,16"):
            parse_layers([text], {"m": 4})

    @pytest.mark.parametrize("text", ["101%", "9999999999%"])
    def test_more_than_all_is_refused(self, text):
        with pytest.raises(LayerRangeError, match="between 0% and 100%"):
            parse_layers([text], {"m": 4})

    def test_an_unknown_model_is_named_with_those_there_are(self):
        with pytest.raises(SpecError, match=r"'z=1' names model 'z'; the models are a, b"):
            parse_layers(["z=1"], {"a": 4, "b": 4})

    def test_a_model_without_layers_is_named(self):
        with pytest.raises(SpecError, match=r"no --layers for model 'b'"):
            parse_layers(["a=1"], {"a": 4, "b": 4})

    @given(st.lists(st.text(max_size=12), max_size=3), st.integers(1, 99))
    def test_any_text_gives_layers_in_range_or_our_error(self, texts, depth):
        try:
            layers = parse_layers(texts, {"m": depth})["m"]
        except FeatstoreError:
            return
        assert layers == tuple(sorted(set(layers)))
        assert all(0 <= layer <= depth for layer in layers)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("500", 500), ("500M", 500_000_000), ("12G", 12 * 10**9), ("1.5k", 1500), ("2GiB", 2 << 30), ("3 MB", 3_000_000)],
)
def test_amounts_of_memory(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "lots", "1P", "1.2.3", "0.1"])
def test_what_is_no_amount_of_memory_is_quoted(text):
    with pytest.raises(SpecError, match=r"amount of memory .*500M or 12G"):
        parse_bytes(text)
