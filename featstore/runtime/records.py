"""Contents of a JSON file as frozen records: one reader, one writer, unknown members kept, damage told in one line.

A record declares the members it knows, with their types; what a newer version wrote beside them is kept and written
again. A member that a file lacks has its default, and is not written: reading a file that this project wrote and
writing it again gives the same bytes. Numbers are finite, and stay integers where they are written as integers.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NoReturn, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from featstore.errors import AdapterError, CorruptDataError, FeatstoreError, MemberError
from featstore.runtime.extras import extras_named
from featstore.runtime.provenance import MAX_DEPTH, parse_json, read_json, write_json
from featstore.runtime.schema import pointer, shown

if TYPE_CHECKING:
    import pandas as pd

V = TypeVar("V")
#: Keys that lead to damage, and what is wrong there.
Fault = tuple[tuple[str | int, ...], str]
R = TypeVar("R", bound="Record")
E = TypeVar("E", bound=FeatstoreError)


class Frozen(dict[str, V]):
    """A dict that cannot be changed; as JSON and to `isinstance` it is a dict."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a record cannot be changed; change its content() and parse that")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


#: Largest integer that every array, seed and count of ours can hold.
LARGEST = 2**64 - 1
#: A count, number or index: an integer from 0 on.
Whole = Annotated[int, Strict(), Field(ge=0, le=LARGEST)]
#: A width, or a number of things of which there is one at least.
Size = Annotated[int, Strict(), Field(ge=1, le=LARGEST)]
Flag = Annotated[bool, Strict()]
#: A finite number. An integer in a file stays one, so that it is written as it was read.
Number = Annotated[int, Strict(), Field(ge=-LARGEST, le=LARGEST)] | Annotated[float, Strict()]
#: A finite number from 0 on.
Amount = Annotated[int, Strict(), Field(ge=0, le=LARGEST)] | Annotated[float, Strict(), Field(ge=0)]
#: A finite number above 0.
Positive = Annotated[int, Strict(), Field(ge=1, le=LARGEST)] | Annotated[float, Strict(), Field(gt=0)]
#: A share of something: 0 to 1.
Part = Annotated[int, Strict(), Field(ge=0, le=1)] | Annotated[float, Strict(), Field(ge=0, le=1)]
#: Ends of a 95 % interval; null where one is undefined.
Interval = tuple[Number | None, Number | None]
#: Rows of numbers; null where a cell is undefined.
Matrix = tuple[tuple[Number | None, ...], ...]
#: A read-only mapping from names to values of one type.
Table = Annotated[Mapping[str, V], AfterValidator(Frozen)]
#: No members: the default of a table.
EMPTY: Mapping[str, Any] = Frozen()

#: What was expected, by the kind of pydantic's complaint; its limits are in braces.
_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text",
    "tuple_type": "a list",
    "mapping_type": "an object",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "too_long": "a list of another length",
    "missing": "a list of another length",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "literal_error": "one of {expected}",
}
#: Complaints that are whole sentences of ours about the place.
_SENTENCES = ("incomplete",)
#: What to do about a damaged document.
_REMEDY = "restore it or re-create it"
#: Damaged places that a message names.
_NAMED = 3


class Record(BaseModel):
    """Members of one JSON object.

    Attributes of the class, not of its instances: ``file`` and ``made_by`` (the command), for a record that is a whole
    file; and ``always``, the members without which a file is damaged rather than old.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, defer_build=True)

    file: ClassVar[str] = ""
    made_by: ClassVar[str] = ""
    always: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def parse(cls, content: Mapping[str, Any], where: str = "") -> Self:
        """Make a record from JSON values.

        Args:
            content: Members; the record keeps no reference to containers of members that it declares.
            where: Named in errors; the class's file by default.

        Raises:
            MemberError: A member is not of its type; the message names the first few and counts the others.
        """
        return _parsed(cls, content, where or cls.file or cls.__name__, complete=False)

    def content(self) -> dict[str, Any]:
        """The members that were given, unknown ones included, as plain JSON values in the order of their names."""
        given = {name: _plain(getattr(self, name)) for name in type(self).model_fields if name in self.model_fields_set}
        return dict(sorted((given | copy.deepcopy(self.model_extra or {})).items()))

    def has(self, *names: str) -> bool:
        """Whether all of some members were given rather than left to their defaults.

        Args:
            names: Members.
        """
        return self.model_fields_set.issuperset(names)

    def members(self) -> tuple[str, ...]:
        """Names of the members that were given, unknown ones included, in order."""
        return tuple(sorted(self.model_fields_set | set(self.model_extra or ())))

    @classmethod
    def declares(cls, name: str) -> bool:
        """Whether the record has a member of this name.

        Args:
            name: Of the member.
        """
        return name in cls.model_fields

    def member(self, name: str) -> Any:
        """A member by name, None where it was not given.

        Args:
            name: A declared member, or an unknown one that was given.

        Raises:
            AttributeError: No version of the file has such a member.
        """
        if name in self.model_fields_set or name in (self.model_extra or {}):
            return getattr(self, name) if name in type(self).model_fields else (self.model_extra or {})[name]
        if name not in type(self).model_fields:
            raise AttributeError(f"{type(self).__name__} declares no member {name!r}")
        return None

    def faults(self) -> Iterator[Fault]:
        """What no type can say: members that do not fit each other. Looked for where a whole file is read.

        Yields:
            Keys that lead from this record to the damage, and a sentence's rest on it: ``is 3, expected 2``.
        """
        yield from ()

    @model_validator(mode="after")
    def _complete(self, info: ValidationInfo) -> Self:
        missing = [name for name in self.always if name not in self.model_fields_set] if info.context else []
        if missing:
            raise PydanticCustomError("incomplete", "has no {name}", {"name": repr(missing[0])})
        return self


def parsed(kind: type[R], data: bytes, where: str, *, remedy: str = _REMEDY) -> R:
    """Parse a whole document, such as one that stands inside of another file.

    Args:
        kind: What it holds.
        data: Its UTF-8 text.
        where: Named in errors.
        remedy: What to do about damage.

    Raises:
        CorruptDataError: It is not a JSON object.
        MemberError: A member is missing, not of its type, or does not fit the others.
    """
    return _parsed(kind, parse_json(data, where), where, complete=True, remedy=remedy)


def retold(error: CorruptDataError, kind: type[E], remedy: str) -> E:
    """Damage as an error of another kind, with another remedy.

    Args:
        error: From reading a document.
        kind: Of the new error.
        remedy: What to do.
    """
    words = str(error).removesuffix(f"; {_REMEDY}")
    return kind(words if words.endswith(remedy) else f"{words}; {remedy}")


def read(kind: type[R], where: Path | str, *, name: str | None = None, remedy: str = _REMEDY) -> R:
    """Read a result.

    Args:
        kind: What the file holds.
        where: The file, or the directory that it lies in.
        name: The file's name in a directory, where it is not the record's own.
        remedy: What to do about damage.

    Raises:
        AdapterError: There is no such file; the message says which command writes it.
        CorruptDataError: The file is not JSON.
        MemberError: A member is missing, not of its type, or does not fit the others.
    """
    path, name = Path(where), name or kind.file
    if not path.is_file() and path.name != name:
        path /= name
    if not path.is_file():
        raise AdapterError(f"no {path.name} in {str(path.parent)!r}; make one with `{kind.made_by}`")
    return _parsed(kind, _loaded(path), str(path), complete=True, remedy=remedy)


def salvage(kind: type[R], path: Path) -> tuple[R, str | None]:
    """Read what can be read of a result: members that are not of their types are left out.

    In a list, such an element becomes null where that is allowed, so that the others keep their places.

    Args:
        kind: What the file holds.
        path: The file.

    Returns:
        The record, and one line on what was left out; None where nothing was.

    Raises:
        CorruptDataError: The file cannot be read or holds no JSON object.
    """
    _regular(path)
    try:
        record, lost = salvaged(kind, path.read_bytes(), str(path))
    except OSError as error:
        raise CorruptDataError(f"{path} cannot be read ({error.strerror}); {_REMEDY}") from error
    return record, lost and f"{path.name}: {lost}"


def salvaged(kind: type[R], data: bytes, where: str) -> tuple[R, str | None]:
    """:func:`salvage` of a document that is no whole file.

    Args:
        kind: What it holds.
        data: Its UTF-8 text.
        where: Named in errors.

    Returns:
        The record, and what was left out, in one line without ``where``; None where nothing was.

    Raises:
        CorruptDataError: It is no JSON object.
    """
    content = _tolerant(data, where)
    lost: dict[str, str] = {}
    # What models wrote may hold halves of surrogate pairs, and is shown as what it is; names may not.
    for place, words in list(_unsound(content)):
        lost.setdefault(pointer(place), f"{pointer(place)} {words}")
        _drop(content, place)
    while True:
        try:
            record = kind.model_validate(content)
            break
        except ValidationError as error:
            for place, words in _damage(error, content):
                lost.setdefault(pointer(place), words)
                _drop(content, place)
    return record, _several(list(lost.values())) if lost else None


def write(record: Record, where: Path, *, name: str | None = None) -> Path:
    """Write a result.

    Args:
        record: What the file is to hold.
        where: Its directory.
        name: The file's name, where it is not the record's own.

    Returns:
        The file.
    """
    path = where / (name or record.file)
    write_json(path, record.content())
    return path


def flat(record: Record) -> dict[str, Any]:
    """A record's declared scalars as columns; an interval becomes ``<name>_low`` and ``<name>_high``.

    Args:
        record: Whose members that are tables, lists or records are left out.
    """
    found: dict[str, Any] = {}
    for name in type(record).model_fields:
        value = getattr(record, name)
        if isinstance(value, tuple) and len(value) == 2 and name.endswith("ci95"):
            stem = name.removesuffix("ci95").rstrip("_")
            found |= {f"{stem}_{end}".lstrip("_"): bound for end, bound in zip(("low", "high"), value, strict=True)}
        elif not isinstance(value, Record | Mapping | tuple):
            found[name] = value
    return found


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A pandas table of rows; columns without any value are left out.

    Args:
        rows: Columns by name.
    """
    # Only here: pandas takes most of a second to import.
    with extras_named():
        import pandas as pd

    return pd.DataFrame(list(rows)).dropna(axis="columns", how="all")


def _regular(path: Path) -> None:
    """Refuse a pipe, which would keep its reader waiting, and a directory."""
    if path.exists() and not path.is_file():
        raise CorruptDataError(f"{path} cannot be read (it is not a file); {_REMEDY}")


def _tolerant(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object with whatever Python's parser takes: what no member may hold is taken out afterwards."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptDataError(f"{where} is not valid JSON ({error}); {_REMEDY}") from error
    if not isinstance(value, dict):
        raise CorruptDataError(f"{where} holds a JSON {type(value).__name__}, expected an object; restore the file")
    return value


def _loaded(path: Path) -> dict[str, Any]:
    _regular(path)
    try:
        return read_json(path)
    except OSError as error:
        raise CorruptDataError(
            f"{path} cannot be read ({error.strerror}); check that it is there and may be read"
        ) from error


def _parsed(kind: type[R], content: Mapping[str, Any], where: str, *, complete: bool, remedy: str = _REMEDY) -> R:
    try:
        record = kind.model_validate(content, context={"complete": True} if complete else None)
    except ValidationError as error:
        found = [words for _, words in _damage(error, content)]
    else:
        found = [f"{pointer(place)} {words}" for place, words in _misfits(record)] if complete else []
        if not found:
            return record
    raise MemberError(f"{_line(where, found)}; {remedy}")


def _unsound(content: Any) -> Iterator[Fault]:
    """Values that no member may have, declared or not, and names that no member may have.

    The strict parser refuses them; here they are found so that the rest can be read.

    Walks without recursion: a document may be nested as deeply as a parser follows.
    """
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), content)]
    while waiting:
        place, inside = waiting.pop()
        for key, value in inside.items() if isinstance(inside, Mapping) else enumerate(inside):
            if isinstance(key, str) and not _encodes(key):
                yield (*place, key), "is a name with half of a surrogate pair, expected text"
            elif isinstance(value, dict | list):
                if len(place) + 1 < MAX_DEPTH:
                    waiting.append(((*place, key), value))
                else:
                    yield (*place, key), f"is nested {MAX_DEPTH} deep, expected a value"
            elif isinstance(value, float):
                if not math.isfinite(value):
                    yield (*place, key), f"is {shown(value)}, expected a finite number"
            elif isinstance(value, int) and abs(value) > LARGEST:
                yield (*place, key), f"is {shown(value)}, expected an integer of 64 bits"


def _encodes(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _misfits(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[Fault]:
    """Faults of a record and of all records inside of it."""
    if isinstance(value, Record):
        for inner, words in value.faults():
            yield (*place, *inner), words
        for name in value.model_fields_set & type(value).model_fields.keys():
            yield from _misfits(getattr(value, name), (*place, name))
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _misfits(each, (*place, key))
    elif isinstance(value, tuple):
        for number, each in enumerate(value):
            yield from _misfits(each, (*place, number))


def _damage(error: ValidationError, content: Any) -> list[Fault]:
    """Each damaged place once: the keys that lead to it, and what is wrong there."""
    found: dict[tuple[str | int, ...], str] = {}
    for each in error.errors(include_url=False):
        value: Any = content
        place: tuple[str | int, ...] = ()
        # A place ends with names of the types that were tried; only what leads through the content counts.
        for key in each["loc"]:
            if not _leads(value, key):
                break
            value, place = value[key], (*place, key)
        limits = each.get("ctx", {})
        expected = _EXPECTED.get(each["type"], "another value").format(**limits)
        # Of several types that were tried the last is the widest.
        words = each["msg"] if each["type"] in _SENTENCES else f"is {shown(value)}, expected {expected}"
        found[place] = f"{pointer(place)} {words}"
    return list(found.items())


def _leads(value: Any, key: str | int) -> bool:
    """Whether an object or a list has something under a key."""
    if isinstance(value, Mapping):
        return key in value
    return isinstance(value, list | tuple) and isinstance(key, int) and 0 <= key < len(value)


def _drop(content: Any, place: tuple[str | int, ...]) -> None:
    """Take a value out of an object; make it null in a list, and take out the list where it is null already."""
    if not place:
        content.clear()
        return
    *above, last = place
    inside = content
    for key in above:
        if not _leads(inside, key):
            return  # it went with something around it
        inside = inside[key]
    if isinstance(inside, dict):
        inside.pop(last, None)
    elif inside[last] is None:
        _drop(content, tuple(above))
    else:
        inside[last] = None


def _line(where: str, found: list[str]) -> str:
    return f"{where}: {_several(found)}"


def _several(found: list[str]) -> str:
    more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{'; '.join(found[:_NAMED])}{more}"


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.content()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value
