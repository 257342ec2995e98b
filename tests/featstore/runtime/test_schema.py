"""Typed records without a package, and the JSON that they are made from."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from featstore.errors import ContradictionError, CorruptDataError, MemberError
from featstore.runtime.provenance import MAX_DEPTH, canonical_json, parse_json
from featstore.runtime.schema import Bounds, Items, Matches, parse
from tests.support.fuzz import RAW_VALUES


@dataclass(frozen=True)
class Inner:
    value: Annotated[float, Bounds(0, 10, exclusive=True)]
    next: Inner | None = None


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, Bounds(1)]
    names: Annotated[tuple[Annotated[str, Matches(r"[a-z]+", "a small name")], ...], Items(least=1, unique=True)]
    kind: Literal["one", "two"] = "one"
    inner: Inner | None = None
    table: Mapping[str, Annotated[int, Bounds(0)]] | None = None
    rising: Annotated[tuple[int, ...], Items(rising=True)] = ()
    either: bool | Inner = False
    with_: str = ""


SOUND: dict[str, Any] = {"count": 3, "names": ["a", "b"]}


def test_members_become_a_record():
    found = parse(Outer, SOUND | {"inner": {"value": 1, "next": {"value": 2.5}}, "with": "x", "newer": [1]}, "doc")
    assert found == Outer(3, ("a", "b"), inner=Inner(1, Inner(2.5)), with_="x")
    assert parse(Outer, SOUND | {"either": {"value": 3}, "table": {"x": 1}}, "doc").either == Inner(3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": 0}, "/count is 0, expected an integer of 1 or more"),
        ({"count": True}, "/count is true, expected an integer"),
        ({"count": 3.0}, "/count is 3.0, expected an integer"),
        ({"count": 10**50}, None),
        ({"names": []}, "/names is a list of 0, expected a list of 1 or more"),
        ({"names": ["a", "a"]}, "/names/1 is 'a', expected what the list does not hold already"),
        ({"names": ["a\n"]}, "/names/0 is 'a\\n', expected a small name"),
        ({"names": {"0": "a"}}, "/names is an object, expected a list"),
        ({"kind": "three"}, "/kind is 'three', expected one of 'one', 'two'"),
        ({"kind": ["one"]}, "/kind is a list of 1, expected one of 'one', 'two'"),
        ({"inner": {}}, "/inner has no 'value'"),
        ({"inner": {"value": 0}}, "/inner/value is 0, expected a number from 0 to 10"),
        ({"inner": {"value": float("nan")}}, "/inner/value is nan, expected a finite number"),
        ({"inner": {"value": 1, "next": {"value": "1"}}}, "/inner/next/value is '1', expected a finite number"),
        ({"table": {"x\x1b": -1}}, "/table/x\\x1b is -1, expected an integer of 0 or more"),
        ({"rising": [1, 3, 2]}, "/rising/2 is 2, expected 3 or more, as the list rises"),
        ({"either": 1}, "/either is 1, expected an object"),
        ({"with": 5}, "/with is 5, expected text"),
    ],
)
def test_damage_is_one_line_that_names_place_and_value(change, words):
    if words is None:
        assert parse(Outer, SOUND | change, "doc").count == 10**50
        return
    with pytest.raises(MemberError) as found:
        parse(Outer, SOUND | change, "doc")
    assert str(found.value) == f"doc: {words}; restore it or extract again"


def test_what_is_no_object_is_refused():
    for content in (None, [], 3, "x"):
        with pytest.raises(MemberError, match=r"^doc: / is "):
            parse(Outer, content, "doc")
    with pytest.raises(MemberError, match="doc: / has no 'count'"):
        parse(Outer, {}, "doc")


# JSON -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RAW_VALUES))
def test_values_that_nobody_wrote_are_one_line(name):
    with pytest.raises(CorruptDataError) as found:
        parse_json(f'{{"a": {RAW_VALUES[name]}}}'.encode(), "doc")
    assert str(found.value).startswith("doc")
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 250


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' stands twice in one object"),
        (b'{"a": [1, NaN]}', "doc: /a/1 is nan, expected a finite number"),
        (b'{"a": -Infinity}', "doc: /a is -inf, expected a finite number"),
        (b'{"a": "\\ud800x"}', "expected text without half a surrogate pair"),
        (b'{"\\udc00": 1}', "expected text without half a surrogate pair"),
        (b'{"a": 99999999999999999999}', "expected an integer of at most 64 bits"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
        (b'{"a": "\xed\xa0\x80"}', "not valid JSON"),
        (b"[]", "holds a JSON list, expected an object"),
    ],
)
def test_documents_that_readers_would_take_differently_are_refused(text, words):
    with pytest.raises(CorruptDataError, match=words):
        parse_json(text, "doc")


def test_what_is_sound_stays_as_it_is():
    value = {"a": [1, -2.5, 1e300, 2**63, "\N{GRINNING FACE}", "NaN", "\\ud800", None, True], "n": {"": {}}}
    assert parse_json(json.dumps(value).encode(), "doc") == value
    deep: Any = {}
    for _ in range(MAX_DEPTH - 1):
        deep = {"a": deep}
    assert canonical_json(parse_json(json.dumps(deep).encode(), "doc")) == canonical_json(deep)
    with pytest.raises(CorruptDataError, match="more than 64 levels"):
        parse_json(json.dumps({"a": deep}).encode(), "doc")


def test_what_other_libraries_write_is_read_where_that_is_said():
    text = b'\xef\xbb\xbf{"a": Infinity, "b": 1, "b": 2}'
    assert parse_json(text, "config.json", foreign=True) == {"a": float("inf"), "b": 2}
    for name in ("lists nested 900 deep", "lists nested 20,000 deep"):
        with pytest.raises(CorruptDataError):
            parse_json(f'{{"a": {RAW_VALUES[name]}}}'.encode(), "doc", foreign=True)


def test_a_contradiction_travels_between_processes():
    error = pickle.loads(pickle.dumps(ContradictionError("s.zarr", "a: no")))
    assert (str(error), error.what) == (str(ContradictionError("s.zarr", "a: no")), "a: no")
