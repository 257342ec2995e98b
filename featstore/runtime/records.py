"""Contents of a JSON file as frozen records: one reader, one writer, unknown members kept, damage told in one line.

A record declares the members it knows, with their types; what a newer version wrote beside them is kept and written
again. A member that a file lacks has its default, and is not written: reading a file that this project wrote and
writing it again gives the same bytes. Numbers are finite, and stay integers where they are written as integers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NoReturn, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Strict, ValidationError, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from featstore.errors import AdapterError, CorruptDataError, MemberError
from featstore.runtime.provenance import read_json, write_json
from featstore.runtime.schema import pointer, shown

if TYPE_CHECKING:
    import pandas as pd

V = TypeVar("V")
R = TypeVar("R", bound="Record")


class Frozen(dict[str, V]):
    """A dict that cannot be changed; as JSON and to `isinstance` it is a dict."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a record cannot be changed; change its content() and parse that")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


Whole = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
#: A finite number. An integer in a file stays one, so that it is written as it was read.
Number = Annotated[int, Strict()] | Annotated[float, Strict()]
#: Ends of a 95 % interval; null where one is undefined.
Interval = tuple[Number | None, Number | None]
#: Rows of numbers; null where a cell is undefined.
Matrix = tuple[tuple[Number | None, ...], ...]
#: A read-only mapping from names to values of one type.
Table = Annotated[Mapping[str, V], AfterValidator(Frozen)]
#: No members: the default of a table.
EMPTY: Mapping[str, Any] = Frozen()

#: What was expected, by the kind of pydantic's complaint.
_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "mapping_type": "an object",
    "dict_type": "an object",
    "model_type": "an object",
    "too_long": "a list of another length",
    "missing": "a list of another length",
}
#: Damaged places that a message names.
_NAMED = 3


class Record(BaseModel):
    """Members of one JSON object.

    Attributes of the class, not of its instances: ``file`` and ``command``, for a record that is a whole file; and
    ``always``, the members without which a file is damaged rather than old.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, defer_build=True)

    file: ClassVar[str] = ""
    command: ClassVar[str] = ""
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
        if name in self.members():
            return getattr(self, name) if name in type(self).model_fields else (self.model_extra or {})[name]
        if name not in type(self).model_fields:
            raise AttributeError(f"{type(self).__name__} declares no member {name!r}")
        return None

    @model_validator(mode="after")
    def _complete(self, info: ValidationInfo) -> Self:
        missing = [name for name in self.always if name not in self.model_fields_set] if info.context else []
        if missing:
            raise PydanticCustomError("incomplete", "has no {name}", {"name": repr(missing[0])})
        return self


def read(kind: type[R], where: Path | str, *, name: str | None = None) -> R:
    """Read a result.

    Args:
        kind: What the file holds.
        where: The file, or the directory that it lies in.
        name: The file's name in a directory, where it is not the record's own.

    Raises:
        AdapterError: There is no such file; the message says which command writes it.
        CorruptDataError: The file is not JSON.
        MemberError: A member is missing or not of its type.
    """
    path, name = Path(where), name or kind.file
    if not path.is_file() and path.name != name:
        path /= name
    if not path.is_file():
        raise AdapterError(f"no {path.name} in {str(path.parent)!r}; make one with `{kind.command}`")
    return _parsed(kind, _loaded(path), str(path), complete=True)


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
    content = _loaded(path, foreign=True)
    lost: dict[str, str] = {}
    while True:
        try:
            record = kind.model_validate(content)
            break
        except ValidationError as error:
            for place, words in _damage(error, content):
                lost.setdefault(pointer(place), words)
                _drop(content, place)
    return record, _line(path.name, list(lost.values())) if lost else None


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
    import pandas as pd

    return pd.DataFrame(list(rows)).dropna(axis="columns", how="all")


def _loaded(path: Path, *, foreign: bool = False) -> dict[str, Any]:
    try:
        return read_json(path, foreign=foreign)
    except OSError as error:
        raise CorruptDataError(f"{path} cannot be read ({error.strerror})") from error


def _parsed(kind: type[R], content: Mapping[str, Any], where: str, *, complete: bool) -> R:
    try:
        return kind.model_validate(content, context={"complete": True} if complete else None)
    except ValidationError as error:
        found = [words for _, words in _damage(error, content)]
        raise MemberError(f"{_line(where, found)}; restore it or re-create it") from error


def _damage(error: ValidationError, content: Any) -> list[tuple[tuple[str | int, ...], str]]:
    """Each damaged place once: the keys that lead to it, and what is wrong there."""
    found: dict[tuple[str | int, ...], str] = {}
    for each in error.errors(include_url=False, include_context=False):
        value: Any = content
        place: tuple[str | int, ...] = ()
        # A place ends with names of the types that were tried; only what leads through the content counts.
        for key in each["loc"]:
            if not _leads(value, key):
                break
            value, place = value[key], (*place, key)
        expected = f"is {shown(value)}, expected {_EXPECTED.get(each['type'], each['msg'])}"
        # Of several types that were tried the last is the widest.
        found[place] = f"{pointer(place)} {each['msg'] if each['type'] == 'incomplete' else expected}"
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
    more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{where}: {'; '.join(found[:_NAMED])}{more}"


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.content()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value
