"""What a report reads: JSON files of run and CKA directories, each value with its origin."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from align import results as fitted
from align.judging.findings import Finding, finding
from align.maps.card import Card
from align.results import epoch_files
from align.runs.logged import read_log
from align.similarity import findings as similarity
from align.sweeps.recorded import Sweep
from evaluate import results as evaluated
from evaluate.stitching import findings as stitching
from featstore.errors import AdapterError
from featstore.runtime.records import Record, salvage

#: A directory with none of these has nothing to report.
KNOWN = ("metrics.json", "cka.json", "stitch.json", "generations.json", "communicate.json", "adapter.json")
#: What a run that was cut short, or is not done, leaves behind.
BEGUN = ("run.yaml", "log.jsonl")
#: A directory with this stands for the runs inside it.
SWEEP = "sweep.json"
#: What `align cka` writes for reading, beside its ``cka.json``.
CKA_PAGE = "cka.html"

#: No figure of a run comes near this; below it, sums and differences of figures stay finite.
_LARGEST = 1e100
_PAIR_KEY = re.compile(r"(?P<source>.+):(?P<ks>\d{1,6})->(?P<target>.+):(?P<kt>\d{1,6})", re.DOTALL)
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROL |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)


def clean_text(text: str) -> str:
    """Make any string printable: control characters become their pictures, lone surrogates U+FFFD.

    Args:
        text: For instance what a model generated.
    """
    return text.replace("\r\n", "\n").translate(_CONTROL)


def portable(reference: str) -> str:
    """Shorten a path on one machine to its last part; anything else stays as it is.

    Args:
        reference: A hub id or a path; a report is passed on, and the path says nothing elsewhere.
    """
    is_path = reference.startswith(("/", "~", "\\\\")) or re.match(r"[A-Za-z]:[\\/]", reference)
    return re.split(r"[\\/]", reference.rstrip("\\/"))[-1] if is_path else reference


@dataclass(frozen=True)
class Node:
    """A value inside a JSON file and the place it was read from; where there is none it holds None.

    Files written by other versions or by hand may lack anything: a member that is not there holds None. A name that the
    record of the file does not declare is a mistake of ours, and fails.
    """

    value: Any = None
    at: str = ""
    href: str = ""

    def get(self, *keys: str | int) -> Node:
        """Follow members, keys and list positions.

        Args:
            keys: One step each.

        Raises:
            AttributeError: A record declares no such member.
        """
        value, at = self.value, self.at
        for key in keys:
            if isinstance(key, str):
                if isinstance(value, Record):
                    value = value.member(key)
                else:
                    value = value.get(key) if isinstance(value, dict) else None
                at += "/" + clean_text(key).replace("~", "~0").replace("/", "~1")
            else:
                value = value[key] if isinstance(value, list | tuple) and 0 <= key < len(value) else None
                at += f"/{key}"
        return Node(value, at, self.href)

    def maybe(self, name: str) -> Node:
        """A member of what may be any of several kinds, not all of which have it.

        Args:
            name: Of the member.
        """
        lacks = isinstance(self.value, Record) and not self.value.declares(name)
        return Node(None, f"{self.at}/{name}", self.href) if lacks else self.get(name)

    def items(self) -> Iterator[tuple[str, Node]]:
        """The members of an object; nothing for any other value."""
        given = self.value.members() if isinstance(self.value, Record) else self.value
        for key in given if isinstance(self.value, dict | Record) else ():
            yield key, self.get(key)

    def __iter__(self) -> Iterator[Node]:
        """The elements of a list; nothing for any other value."""
        return (self.get(i) for i in range(len(self.value) if isinstance(self.value, list | tuple) else 0))

    @property
    def number(self) -> float | None:
        """The value if it is a number that can be a measurement: finite, and of a sane size."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            return None
        try:
            number = float(self.value)
        except OverflowError:
            return None
        return number if abs(number) <= _LARGEST else None

    @property
    def text(self) -> str:
        """The value as printable text; empty for what is missing or has parts."""
        if self.value is None or isinstance(self.value, dict | list | tuple | Record):
            return ""
        if isinstance(self.value, bool):
            return "yes" if self.value else "no"
        return clean_text(str(self.value))


@dataclass(frozen=True)
class Pair:
    """One layer pair's key and what it says: which layer of which model goes where."""

    key: str
    source: str
    source_layer: str
    target: str
    target_layer: str

    @classmethod
    def parse(cls, key: str) -> Pair:
        """Read ``smol:15->twin:15``; an unexpected key is kept whole, so that it still shows.

        Args:
            key: The key of a layer pair.
        """
        found = _PAIR_KEY.fullmatch(key)
        return cls(key, *found.groups()) if found else cls(key, "", "", "", "")

    @property
    def is_ceiling(self) -> bool:
        """Whether a model is mapped to itself: what is lost where nothing is lost between two models."""
        return bool(self.source) and self.source == self.target

    @property
    def direction(self) -> str:
        """From which model to which; empty for a key that says nothing of the kind."""
        return clean_text(f"{self.source} → {self.target}") if self.source else ""

    def __str__(self) -> str:
        return clean_text(self.key).replace("->", " → ")


@dataclass(frozen=True)
class Origin:
    """A file by its name in the report and where the page finds it; no address where the page lies nowhere yet."""

    name: str
    href: str = ""


@dataclass(frozen=True)
class SourceFile(Origin):
    """A file that was read, its size and SHA-256."""

    size: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class Run:
    """One run or CKA directory.

    Attributes:
        href: The directory's address from the page, ending in a slash; empty for none.
        notes: Findings about the files themselves, such as cells of a sweep that failed.
    """

    label: str
    href: str = ""
    files: dict[str, Node] = field(default_factory=dict)
    epochs: tuple[Node, ...] = ()
    log: Node = field(default_factory=Node)
    sources: tuple[SourceFile, ...] = ()
    cka_page: Origin | None = None
    notes: tuple[Finding, ...] = ()

    def file(self, name: str) -> Node:
        """The content of one file; a missing one holds None.

        Args:
            name: For instance ``metrics.json``.
        """
        return self.files.get(name, Node(None, f"{self.label}/{name}#"))

    def origin(self, name: str) -> Origin:
        """One file by name and address.

        Args:
            name: For instance ``metrics.json``.
        """
        return Origin(f"{self.label}/{name}", self.href and self.href + quote(name))

    @property
    def type(self) -> str:
        """The map's type, from whichever file names it."""
        return (
            self.file("adapter.json").get("type").text
            or self.file("metrics.json").get("type").text
            or self.file("stitch.json").get("adapter_type").text
        )

    @property
    def trained(self) -> bool:
        """Whether a gradient loop ran, rather than a closed form."""
        figures = [event.get("train_loss") for event in self.log]
        figures += [epoch.get("train_loss") for epoch in self.epochs]
        return any(figure.number is not None for figure in figures)

    @property
    def holds_a_map(self) -> bool:
        """Whether this is a run with maps, not only a comparison by CKA."""
        return bool(set(self.files) - {"cka.json"})

    @property
    def pairs(self) -> list[Pair]:
        """The layer pairs that any file knows, in the order they are first named."""
        keys = [entry.get("key").text for entry in self.file("adapter.json").get("pairs")]
        for name in ("metrics.json", "stitch.json"):
            keys += [key for key, _ in self.file(name).get("pairs").items()]
        return [Pair.parse(key) for key in dict.fromkeys(keys) if key]

    def card_pair(self, key: str) -> Node:
        """The card's entry for a layer pair.

        Args:
            key: The pair's key.
        """
        for entry in self.file("adapter.json").get("pairs"):
            if entry.get("key").value == key:
                return entry
        return Node(None, f"{self.label}/adapter.json#/pairs")


def read_runs(dirs: Sequence[Path], base: Path | None = None) -> list[Run]:
    """Read every directory once, in the order given; a sweep stands for its runs.

    Args:
        dirs: Run, CKA and sweep directories; one named twice is read once.
        base: Directory of the page, from which files are addressed; None for a page without addresses.

    Raises:
        AdapterError: No directory was given, or one holds none of the files a report shows.
        CorruptDataError: A file is there but is not JSON.
    """
    given = list(dict.fromkeys(Path(path).resolve() for path in dirs))
    if not given:
        raise AdapterError("no directory given; name at least one run or CKA directory")
    paths: dict[Path, tuple[Finding, ...]] = {}
    for path in given:
        for found, notes in _expanded(path).items():
            paths.setdefault(found, ())
            paths[found] += notes
    named = zip(paths.items(), _labels(list(paths)), strict=True)
    return [_read_run(path, label, _address(path, base), notes) for (path, notes), label in named]


def _expanded(path: Path) -> dict[Path, tuple[Finding, ...]]:
    # A sweep is its finished cells, in the order of the grid; what failed is said at the first of them.
    if not (path / SWEEP).is_file() or any((path / name).exists() for name in KNOWN):
        return {path: ()}
    content, lost = salvage(Sweep, path / SWEEP)
    sweep = Node(content.content())
    inside = [entry for entry in sorted(path.iterdir()) if any((entry / name).exists() for name in KNOWN)]
    cells = [(cell.get("name").text, cell) for cell in sweep.get("cells")]
    order = {name: place for place, (name, _) in enumerate(cells)}
    inside.sort(key=lambda entry: order.get(entry.name, len(order)))
    if not inside:
        raise AdapterError(f"{path} is a sweep without a finished run; see {SWEEP} for why, or wait for its first cell")
    notes = _damage(lost)
    for name, cell in cells:
        why = " ".join(portable(word) for word in cell.get("error").text.split())
        if cell.get("status").text == "failed" or why:
            notes += (finding("failed-cell", cell=f"{path.name}/{name}", why=why or "no reason is given"),)
        elif not any(entry.name == name for entry in inside):
            notes += (finding("unfinished-cell", cell=f"{path.name}/{name}"),)
    return {entry: notes if place == 0 else () for place, entry in enumerate(inside)}


def _address(path: Path, base: Path | None) -> str:
    if base is None:
        return ""
    try:
        relative = Path(os.path.relpath(path, base.resolve())).as_posix()
    except ValueError:  # another drive
        return path.as_uri() + "/"
    # The leading dot keeps a colon in a name from being read as a scheme.
    return quote(relative if relative.startswith("..") else f"./{relative}") + "/"


def _labels(paths: Sequence[Path]) -> list[str]:
    # As few trailing parts as tell the directories apart: a report is passed on, and where the
    # runs lay on one machine says nothing to its reader.
    depth = 1
    while True:
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(paths):
            return [clean_text(label) for label in labels]
        depth += 1


def _read_run(path: Path, label: str, href: str, notes: tuple[Finding, ...]) -> Run:
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise AdapterError(f"{path} {what}; expected a run or CKA directory")
    names = [name for name in KNOWN if (path / name).exists()]
    begun = [name for name in BEGUN if (path / name).exists()]
    if not names and begun:
        notes += (finding("unfinished-run", run=label),)
    elif not names:
        raise AdapterError(
            f"{path} holds none of {', '.join(KNOWN)}; name a directory written by `align train` or `align cka`"
        )
    epochs = epoch_files(path)
    contents, sources = {}, []
    for name in [*names, *(name for _, name in epochs)]:
        content, lost = _content(path / name)
        contents[name] = Node(content, f"{label}/{name}#", href and href + quote(name))
        notes += _damage(lost)
        sources.append(_source(path / name, label, href))
    log = Node()
    if (path / "log.jsonl").exists():
        events, torn, lost = read_log(path / "log.jsonl")
        notes += (*_damage(lost), *((finding("torn-log"),) if torn else ()))
        lines = [event.content() for event in events]
        log = Node(lines, f"{label}/log.jsonl#", href and f"{href}log.jsonl")
        sources.append(_source(path / "log.jsonl", label, href))
    return Run(
        label=label,
        href=href,
        files={name: contents[name] for name in names},
        epochs=tuple(contents[name] for _, name in epochs),
        log=log,
        sources=tuple(sources),
        cka_page=Origin(f"{label}/{CKA_PAGE}", href and href + CKA_PAGE) if (path / CKA_PAGE).is_file() else None,
        notes=notes,
    )


def _content(path: Path) -> tuple[Record | dict[str, Any], str | None]:
    """What a file says, values that are not of their types left out, and one line on those."""
    if path.name == Card.file:
        # Whoever asks a card knows it as plain values: old ones and new ones differ in what they hold.
        card, lost = salvage(Card, path)
        return card.content(), lost
    kind = fitted.kind_of(path.name) or evaluated.kind_of(path.name)
    if kind is None:
        raise AdapterError(f"{path} is no file of a run; name a directory written by `align train` or `align cka`")
    record, lost = salvage(kind, path)
    # What was not judged when it was made is judged now, by the same functions, so that pages need not.
    if isinstance(record, fitted.Similarity):
        record = similarity.rejudged(record)
    elif isinstance(record, evaluated.Stitched):
        record = stitching.rejudged(record)
    return record, lost


def _damage(lost: str | None) -> tuple[Finding, ...]:
    return () if lost is None else (finding("damaged-file", lost=lost),)


def _source(path: Path, label: str, href: str) -> SourceFile:
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return SourceFile(f"{label}/{path.name}", href and href + quote(path.name), len(data), digest)
