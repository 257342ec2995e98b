"""Similarity of all layers as a notebook meets it: the record of ``cka.json``, with a picture and a readable form."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import PrivateAttr

from align import results
from align.similarity.words import best_partners, floor_lines
from featstore.errors import CorruptDataError, SpecError
from featstore.runtime import records
from featstore.runtime.arguments import as_path
from featstore.runtime.extras import drawn, extras_named
from featstore.runtime.sheets import Sheet, counted, number
from featstore.text.roles import of_roles

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

#: What :meth:`Similarity.write` may write.
_FILES = ("cka.json", "cka_documents.json", "cka.html", "cka.png", "cka.svg", "measures.png", "measures.svg")


class Similarity(results.Similarity):
    """What :func:`align.cka` found: ``found.cross[i][j]``, ``found.within["llama"]``, ``found.measures``, and so on.

    All members of :class:`align.results.Similarity` are attributes.
    """

    _written: tuple[Path, tuple[str, ...]] | None = PrivateAttr(default=None)

    @classmethod
    def read(cls, where: str | os.PathLike[str]) -> Self:
        """Read what `align cka`, or an earlier call with ``out=``, has written.

        Args:
            where: Its directory, or the file ``cka.json``.

        Raises:
            AdapterError: There is none.
            CorruptDataError: It is damaged, or a table has other rows or columns than there are layers.
        """
        place = as_path("where", where)
        directory = place if place.is_dir() else place.parent
        found = records.read(cls, place)
        if where_not := next(_misfits(found, found), None):
            raise CorruptDataError(
                f"{directory / cls.file}: {where_not} does not fit the layers of its two models; restore it or "
                "re-create it"
            )
        return found.at(directory, [name for name in _FILES if (directory / name).is_file()])

    def at(self, directory: Path, names: Iterable[str]) -> Self:
        """Remember where this result lies.

        Args:
            directory: Where.
            names: Of its files.
        """
        self._written = directory, tuple(names)
        return self

    def write(self, directory: Path, by_document: results.SimilarityDocuments | None = None) -> None:
        """Write ``cka.json``, and the page and the pictures where there is what draws them.

        Args:
            directory: Where.
            by_document: For ``cka_documents.json``; None for none.
        """
        content = self.content()
        names = [results.write_similarity(directory, self).name]
        if by_document is not None:
            names.append(results.write_similarity_documents(directory, by_document).name)
        if drawn("the page and the heatmaps", "jinja2", "matplotlib"):
            from align.similarity import heatmaps, page

            names += [page.write(content, directory), *heatmaps.plot(content, directory)]
        self.at(directory, names)

    @property
    def path(self) -> Path | None:
        """The directory it was written to; None where nothing was written."""
        return self._written and self._written[0]

    @property
    def files(self) -> list[str]:
        """Names of the files in that directory."""
        return list(self._written[1]) if self._written else []

    @extras_named()
    def plot(self, *, measures: bool = False) -> Figure:
        """Draw heatmaps of CKA between the models and within each, with sinks and without.

        Args:
            measures: Draw the other measures instead, one map for each.

        Raises:
            SpecError: Other measures were asked for, and none was computed.
        """
        # Only here: matplotlib takes half a second to import.
        from align.similarity.heatmaps import draw

        if measures and not self.measures:
            raise SpecError("no other measures were computed; give measures='all' to align.cka")
        return draw(self.content(), measures=measures)

    def __rich__(self) -> RenderableType:
        """CKA between the models for a terminal."""
        return self._sheet().__rich__()

    def __repr__(self) -> str:
        """One line."""
        first, second = self.models
        shape = f"{counted(len(self.layers[first]), 'layer')} of {first} x {len(self.layers[second])} of {second}"
        known = [value for row in self.cross for value in row if value is not None]
        ends = f"{min(known):.3f} to {max(known):.3f}" if known else "undefined"
        return f"<Similarity {shape}: {self.estimator} {self.kernel} CKA {ends}, {self.n} pairs>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return self._sheet().html()

    def _sheet(self) -> Sheet:
        first, second = self.models
        names = [f"{second}:{layer}" for layer in self.layers[second]]
        rows = [
            (f"{first}:{layer}", *map(number, row)) for layer, row in zip(self.layers[first], self.cross, strict=True)
        ]
        notes = [
            f"{first}:{layer} is most like {second}:{best['layer']} ({best['cka']:.3f})"
            for layer, best in best_partners(self.content()).items()
        ]
        notes += floor_lines(self.content())
        notes += [f"undefined: {where}: {why}" for where, why in self.reasons.items()]
        sinks = "with" if self.keep_sinks else "without"
        title = f"{self.estimator} {self.kernel} CKA over {self.n} pairs{of_roles(self.roles)}, {sinks} attention sinks"
        return Sheet(title, ("", *names), tuple(rows), tuple(notes))


def _misfits(whole: results.Similarity, record: records.Record, where: str = "") -> Iterator[str]:
    """Members of a record, and of those in it, whose tables are not of the layers."""
    if len(whole.models) != 2 or not all(whole.layers.get(name) for name in whole.models):
        yield "models"
        return
    first, second = (len(whole.layers[name]) for name in whole.models)
    for name in type(record).model_fields:
        value = getattr(record, name)
        exchanged = isinstance(record, results.Exchanged) and name in results.Exchanged.model_fields
        if (exchanged or name in ("cross", "reverse")) and value and _shape(value) != {(first, second)}:
            yield f"{where}{name}"
        elif name == "within":
            for model, table in value.items():
                layers = len(whole.layers.get(model, ()))
                if _shape(table) != {(layers, layers)}:
                    yield f"{where}{name}/{model}"
        elif isinstance(value, records.Record):
            yield from _misfits(whole, value, f"{where}{name}/")
        elif isinstance(value, Mapping):
            for key, each in value.items():
                if isinstance(each, records.Record):
                    yield from _misfits(whole, each, f"{where}{name}/{key}/")


def _shape(table: Sequence[Sequence[Any]]) -> set[tuple[int, int]]:
    """Rows and columns of a table: one pair where all rows are of one length."""
    return {(len(table), len(row)) for row in table}
