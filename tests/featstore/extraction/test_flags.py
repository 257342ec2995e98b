"""Flags to settings: what was given, what was not, and what cannot be meant."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore.cli import extract
from featstore.errors import SpecError
from featstore.extraction.flags import MINIMUM, parse_settings
from featstore.extraction.settings import Settings


def test_nothing_given_is_the_defaults_and_all_may_come_from_the_store():
    settings = parse_settings({"dataset": None, "store": "s.zarr", "device": "cpu", "moments_memory": "500M"})
    expected = Settings(store=Path("s.zarr"), device="cpu", moments_memory=500_000_000, given=frozenset())
    assert settings == expected


def test_what_is_given_counts_as_given():
    values: dict[str, Any] = {"layers": ["0,1"], "max_tokens": "all", "seed": 0, "form": "int8"}
    settings = parse_settings(values, moments=True)
    assert settings.given == {"layers", "max_tokens", "seed", "form", "moments"}
    assert (settings.layers, settings.max_tokens, settings.form, settings.moments) == (("0,1",), None, "int8", "add")
    assert parse_settings({}, moments_only=True).moments == "only"


@pytest.mark.parametrize("given", [1_000_000, "1M", np.int64(1_000_000), 1e6])
def test_budgets_are_numbers_or_texts(given):
    settings = parse_settings({"max_tokens": given, "moments_memory": given})
    assert (settings.max_tokens, settings.moments_memory) == (10**6, 10**6)


def test_numbers_become_those_of_python():
    """They go into the store's JSON."""
    settings = parse_settings({"window_bytes": np.int32(512), "sink_threshold": np.float32(6)})
    assert (type(settings.window_bytes), type(settings.sink_threshold)) == (int, float)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dataset", Path("x"), r"--dataset .*x.*: give it as text, not as PosixPath"),
        ("form", 8, "--format 8: give it as text, not as int"),
        ("attention", None.__class__, "--attn .*: give it as text"),
        ("layers", [0, 1], "--layers 0: give it as text"),
        ("store", 3, "--store 3: give a path, not int"),
        ("max_documents", 0, "--max-documents 0: give a number of at least 1"),
        ("max_documents", "5", "--max-documents '5': give a whole number, not str"),
        ("seed", True, "--seed True: give a whole number, not bool"),
        ("seed", -1, "--seed -1: give a number of at least 0"),
        ("shard_rows", 1024.0, "--shard-rows 1024.0: give a whole number, not float"),
        ("sink_threshold", float("nan"), "--sink-threshold nan: give a number of at least 1"),
        ("sink_threshold", "5", "--sink-threshold '5': give a number"),
        ("max_tokens", -3, "token budget '-3'"),
        ("max_tokens", True, "token budget 'True'"),
        ("moments_memory", 0, "amount of memory '0'"),
    ],
)
def test_what_cannot_be_meant_is_named_with_its_flag(field, value, message):
    with pytest.raises(SpecError, match=message):
        parse_settings({field: value})


def test_the_command_line_has_the_same_bounds():
    """As the command is declared: what becomes of it differs between versions of typer."""
    hints = typing.get_type_hints(extract, include_extras=True)
    fields = {field.name for field in dataclasses.fields(Settings)} - {"given", "moments"}
    assert MINIMUM.keys() < fields
    for field in fields:
        [option] = hints[{"attention": "attn"}.get(field, field)].__metadata__
        assert option.min == MINIMUM.get(field), field
