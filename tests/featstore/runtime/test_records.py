"""Records: what is read is what is written, what is damaged is told in one line, and nothing can be changed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import AdapterError, CorruptDataError, MemberError
from featstore.runtime.provenance import json_text
from featstore.runtime.records import (
    EMPTY,
    Flag,
    Interval,
    Matrix,
    Number,
    Record,
    Table,
    Whole,
    flat,
    read,
    salvage,
    write,
)


class Inner(Record):
    value: Number | None = None
    ci95: Interval | None = None


class Outer(Record):
    file: ClassVar[str] = "outer.json"
    made_by: ClassVar[str] = "make outer"
    always: ClassVar[tuple[str, ...]] = ("name",)

    name: str = ""
    count: Whole | None = None
    sure: Flag | None = None
    matrix: Matrix = ()
    inner: Inner = Inner()
    table: Table[Inner | None] = EMPTY
    items: tuple[Inner, ...] = ()


WHOLE: dict[str, Any] = {
    "name": "n",
    "count": 3,
    "sure": True,
    "matrix": [[1.5, None], [2, 1e-320]],
    "inner": {"value": 0.1, "ci95": [0, None]},
    "table": {"b": {"value": 1}, "a": None},
    "items": [{"value": None}, {}],
    "newer": {"deep": [1, {"x": None}]},
}
#: No array of ours holds more than 64 bits.
numbers = st.none() | st.integers(-(2**64) + 1, 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)


def saved(tmp_path: Path, content: Any, name: str = Outer.file) -> Path:
    path = tmp_path / name
    path.write_text(json_text(content) if not isinstance(content, str) else content)
    return path


def test_what_is_read_and_written_again_has_the_same_bytes(tmp_path: Path) -> None:
    path = saved(tmp_path, WHOLE)
    record = read(Outer, tmp_path)
    assert write(record, tmp_path / "again").read_bytes() == path.read_bytes()
    assert record.content() == WHOLE
    assert json.dumps(record.table["b"].content()) == '{"value": 1}'


@given(st.lists(st.lists(numbers)), st.dictionaries(st.text(), st.none() | st.fixed_dictionaries({"value": numbers})))
def test_numbers_stay_what_they_are(matrix: list[list[Any]], table: dict[str, Any]) -> None:
    content = {"matrix": matrix, "table": table}
    assert json_text(Outer.parse(content).content()) == json_text(content)


def test_what_a_file_lacks_is_neither_made_up_nor_written() -> None:
    record = Outer.parse({"name": "n"})
    assert (record.inner.value, record.table, record.items, record.count) == (None, {}, (), None)
    assert record.content() == {"name": "n"}
    assert record.has("name")
    assert not record.has("name", "inner")
    assert record.member("count") is None
    with pytest.raises(AttributeError, match="Outer declares no member 'cuont'"):
        record.member("cuont")


def test_unknown_members_are_kept_at_any_depth() -> None:
    content = {"name": "n", "inner": {"value": 1.0, "newer": [2]}, "table": {"a": {"newest": [[]]}}}
    record = Outer.parse(content)
    assert record.content() == content
    assert record.inner.members() == ("newer", "value")
    assert record.inner.member("newer") == [2]
    record.content()["inner"]["newer"].append(3)
    assert record.inner.member("newer") == [2]


def test_nothing_can_be_changed() -> None:
    given = copy.deepcopy(WHOLE)
    record = Outer.parse(given)
    given["table"]["c"] = given["matrix"] = 3
    assert record.content() == WHOLE
    with pytest.raises(ValueError, match="frozen"):
        record.name = "other"
    for change in (
        lambda: record.table.update(c=None),
        lambda: record.table.pop("a"),
        lambda: record.table.__setitem__("a", None),
        lambda: EMPTY.__setitem__("a", 1),
    ):
        with pytest.raises(TypeError, match="cannot be changed"):
            change()
    assert copy.deepcopy(record) == record


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("name",), 3, "/name is 3, expected text"),
        (("count",), 1.5, "/count is 1.5, expected an integer"),
        (("count",), True, "/count is true, expected an integer"),
        (("sure",), "yes", "/sure is 'yes', expected true or false"),
        (("inner",), None, "/inner is null, expected an object"),
        (("inner", "value"), "0.1", "/inner/value is '0.1', expected a number"),
        (("inner", "value"), float("nan"), "/inner/value is nan, expected a finite number"),
        (("inner", "ci95"), [1], "/inner/ci95 is a list of 1, expected a list of another length"),
        (("inner", "ci95"), [1, 2, 3], "/inner/ci95 is a list of 3, expected a list of another length"),
        (("matrix", 1, 0), {}, "/matrix/1/0 is an object, expected a number"),
        (("matrix",), "x" * 99, f"/matrix is '{'x' * 38}…, expected a list"),
        (("table",), [1], "/table is a list of 1, expected an object"),
        (("table", "b"), 7, "/table/b is 7, expected an object"),
    ],
)
def test_damage_is_one_line_that_names_place_and_value(
    tmp_path: Path, place: tuple[Any, ...], value: Any, words: str
) -> None:
    content = copy.deepcopy(WHOLE)
    inside: Any = content
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    (tmp_path / Outer.file).write_text(json.dumps(content))
    with pytest.raises(MemberError) as caught:
        read(Outer, tmp_path)
    assert str(caught.value) == f"{tmp_path / Outer.file}: {words}; restore it or re-create it"
    assert issubclass(MemberError, CorruptDataError)


def test_a_key_may_hold_anything(tmp_path: Path) -> None:
    with pytest.raises(MemberError, match=r"/table/a~1b~0/value is 'x'"):
        Outer.parse({"table": {"a/b~": {"value": "x"}}})


def test_much_damage_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MemberError, match=r"/matrix/0/2 is 'x', expected a number, and 7 more; restore") as caught:
        Outer.parse({"matrix": [["x"] * 10]}, "somewhere")
    assert "\n" not in str(caught.value)


def test_what_is_missing_or_no_json_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"^no outer.json in '.*'; make one with `make outer`$"):
        read(Outer, tmp_path)
    for where in (tmp_path / "nowhere", tmp_path / "nowhere" / "outer.json", str(tmp_path / "nowhere")):
        with pytest.raises(AdapterError, match=r"^no outer.json in '.*nowhere'; make one with `make outer`$"):
            read(Outer, where)
    with pytest.raises(CorruptDataError, match=r"outer.json is not valid JSON \(.*\); restore it or re-create it$"):
        read(Outer, saved(tmp_path, "{"))
    with pytest.raises(CorruptDataError, match="holds a JSON list, expected an object"):
        read(Outer, saved(tmp_path, [1]))
    with pytest.raises(MemberError, match=r"outer\.json: / has no 'name'; restore it or re-create it"):
        read(Outer, saved(tmp_path, {"count": 1}))


def test_what_is_left_of_a_damaged_file(tmp_path: Path) -> None:
    content = copy.deepcopy(WHOLE)
    content |= {"count": "x", "matrix": [[1, "x"], 3], "items": [{"value": 1}, "text", {"value": "x"}]}
    content["table"]["c"] = {"value": 2, "ci95": 3}
    path = saved(tmp_path, content)
    record, line = salvage(Outer, path)
    # A row that is not one makes the matrix none; a cell becomes null and keeps the place of the others.
    left = {"items": None, "matrix": None, "count": None}
    assert record.content() == {k: v for k, v in {**WHOLE, **left}.items() if v is not None} | {
        "table": WHOLE["table"] | {"c": {"value": 2}}
    }
    assert line is not None
    assert line.startswith("outer.json: /count is 'x', expected an integer; ")
    assert path.read_text() == json_text(content)


def test_a_damaged_cell_keeps_the_others_in_their_places(tmp_path: Path) -> None:
    record, line = salvage(Outer, saved(tmp_path, {"matrix": [[1, "x", 3], [4, 5, 6]]}))
    assert record.matrix == ((1, None, 3), (4, 5, 6))
    assert line == "outer.json: /matrix/0/1 is 'x', expected a number"


def test_a_whole_file_has_nothing_to_salvage(tmp_path: Path) -> None:
    assert salvage(Outer, saved(tmp_path, WHOLE)) == (Outer.parse(WHOLE), None)
    assert salvage(Outer, saved(tmp_path, {})) == (Outer(), None)
    with pytest.raises(CorruptDataError, match="not valid JSON"):
        salvage(Outer, saved(tmp_path, "{"))


def test_columns_of_a_record() -> None:
    assert flat(Inner.parse({"value": 2, "ci95": [1, None]})) == {"value": 2, "low": 1, "high": None}
