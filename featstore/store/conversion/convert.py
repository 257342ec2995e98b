"""A store in another format or layout: the same text, tokens, pairs and masks around re-encoded rows.

The result is a store of its own beside the first, written shard by shard with the bounded memory, the commits and the
resume of an extraction: what was killed goes on when the same command is run again, and ends with the same bytes.

What hangs on the states' values is treated by whether they change. Where they stay what a reader sees (another layout,
the same format, or float32, which holds every other format's values), norms and moments are copied. Where they are
rounded, norms are taken anew and moments, which would be sums of other values, are left out. Pilot and sink mask are
copied in any case: both say something about the model, and the same rows masked on both sides keep figures comparable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import CorruptDataError, NonFiniteStateError, SpecError, StoreFormatError, StoreStateError
from featstore.runtime.console import Tick, human_bytes, progress
from featstore.store.conversion.pilot_rows import pilot_windows, without_sinks
from featstore.store.format.elements import Encoded, Format, column_scale_of, parse_format
from featstore.store.format.encoding import Encoding
from featstore.store.format.shards import Layout, file_checksum, parse_layout
from featstore.store.format.version import MANIFEST, METADATA_UNIT
from featstore.store.moments.stored import has_rows
from featstore.store.read.portable import store_files
from featstore.store.read.rows import RowReader
from featstore.store.read.store import Store, open_files
from featstore.store.read.tables import TableReader
from featstore.store.write.row_writer import RowArrays, RowWriter, rows_unit, write_groups
from featstore.store.write.space import check_space
from featstore.store.write.table import table_unit, write_table
from featstore.store.write.writer import StoreWriter, exclusive, read_entry

#: Rows that are decoded at a time.
_STEP = 1024
#: Rows of a layer by which the change of values is measured.
_SAMPLE = 1024
#: What follows from text and tokens, or was frozen before any value was rounded; everything else is of the values.
_OF_NO_VALUE = ("tokens", "sinks")


def convert(
    path: Path,
    out: Path | None = None,
    *,
    form: str | None = None,
    layout: str | None = None,
    shard_rows: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a store again with its rows in another format, layout or shard length, or go on with that.

    Args:
        path: A complete store.
        out: Where the new one goes; None for ``<stem>-<format>-<layout>.zarr`` beside it.
        form: Element format; None keeps each model's.
        layout: ``hot`` or ``archive``; None keeps each model's.
        shard_rows: Rows of a shard; None keeps each model's.
        quiet: No progress.

    Returns:
        ``store``, ``converted_from``, ``models`` (format, layout and shard_rows of each), ``bytes`` and
        ``bytes_before``, ``exact``: whether readers see the values they saw before; ``relative_error``: None then, else
        median and largest by model and layer, of evenly spread rows; ``dropped``: units left out, as they would be of
        other values.

    Raises:
        SpecError: No such format or layout, nothing would change, or the new store would lie in the old one.
        StoreFormatError: Something else is at ``out``.
        StoreStateError: Another store is at ``out``, or the store holds moments without rows or is of an older format
            version.
        StoreBusyError: Another process writes to ``out``.
        NoSpaceError: The disk cannot hold it.
        NonFiniteStateError: A value that float16 cannot hold.
        CorruptDataError: The store is damaged.
    """
    source = open_files(store_files(path))
    source.require_current()
    before = {name: _encoding_of(source, name) for name in source.models}
    wanted = (
        None if form is None else parse_format(form),
        None if layout is None else parse_layout(layout),
        shard_rows,
    )
    after = {name: _wanted(encoding, *wanted) for name, encoding in before.items()}
    if after == before:
        held = ", ".join(f"{e.form.name} {e.layout.name}" for e in sorted(set(before.values()), key=str))
        raise SpecError(f"{path} is {held} already; name another --format, --layout or --shard-rows")
    conversion = _Conversion(source, before, after)
    target = out if out is not None else default_path(path, after)
    _refuse_strangers(path, target)
    conversion.refuse_another(StoreWriter(target))
    check_space(target, conversion.bytes_to_write(StoreWriter(target)), "name another disk with --out")
    with exclusive(target):
        writer = StoreWriter(target)
        # Only now: what another process made of it while we waited belongs to it.
        conversion.refuse_another(writer)
        if not (writer.attributes() or {}).get("featstore", {}).get("complete"):
            conversion.write(writer, quiet=quiet)
        result = writer.view
    return {
        "store": str(target),
        "converted_from": result.attributes["converted_from"],
        "models": {name: encoding.to_dict() for name, encoding in after.items()},
        "bytes": _bytes_of(result),
        "bytes_before": _bytes_of(source),
        "exact": conversion.exact,
        "relative_error": None if conversion.exact else _relative_errors(source, result, quiet=quiet),
        "dropped": conversion.dropped(),
    }


def describe_conversion(result: dict[str, Any]) -> str:
    """A conversion for people.

    Args:
        result: From :func:`convert`.
    """
    kinds = sorted({f"{m['format']} {m['layout']}" for m in result["models"].values()})
    ratio = result["bytes_before"] / result["bytes"]
    lines = [f"{result['store']}: {', '.join(kinds)}, {human_bytes(result['bytes'])} ({ratio:.2f} x smaller)"]
    if result["exact"]:
        lines.append("  readers see exactly the values they saw before")
    else:
        errors = [e for layers in result["relative_error"].values() for e in layers.values()]
        middle, worst = max(e["median"] for e in errors), max(e["max"] for e in errors)
        lines.append(
            f"  values were rounded: relative error of a row up to {middle:.2g} in a layer's median, "
            f"{worst:.2g} at most"
        )
    if result["dropped"]:
        lines.append(
            f"  {len(result['dropped'])} units of other values were left out ({result['dropped'][0]}, ...); "
            f"moments can be made again from the new rows"
        )
    return "\n".join(lines)


def default_path(path: Path, encodings: Mapping[str, Encoding]) -> Path:
    """Where a conversion goes when nobody says.

    Args:
        path: The store that is converted.
        encodings: What it is converted to, by model.
    """
    forms = "+".join(sorted({e.form.name for e in encodings.values()}))
    layouts = "+".join(sorted({e.layout.name for e in encodings.values()}))
    whole = path.resolve()
    return whole.with_name(f"{whole.stem}-{forms}-{layouts}.zarr")


# What is there and what is wanted -----------------------------------------------------------------------------------


def _encoding_of(store: Store, name: str) -> Encoding:
    for layer in store.model(name).layers:
        if not has_rows(store, name, layer):
            raise StoreStateError(
                f"{store.path} holds no rows of layer {layer} of {name!r}, only what was summed from them; "
                "there is nothing to convert: extract again without --moments-only"
            )
    reader = _plain(store.rows(name, store.model(name).layers[-1]))
    return Encoding(reader.form, reader.layout, reader.shard_rows)


def _plain(reader: RowReader | TableReader) -> RowReader:
    return reader.table if isinstance(reader, TableReader) else reader


def _wanted(held: Encoding, form: Format | None, layout: Layout | None, shard_rows: int | None) -> Encoding:
    wanted = Encoding(form or held.form, layout or held.layout, held.shard_rows if shard_rows is None else shard_rows)
    chunk = wanted.layout.chunk_rows
    if wanted.shard_rows < 1 or wanted.shard_rows % chunk:
        raise SpecError(
            f"shards of {wanted.shard_rows} rows: layout {wanted.layout.name} needs a multiple of {chunk}; "
            f"add --shard-rows {-(-max(wanted.shard_rows, 1) // chunk) * chunk}"
        )
    return wanted


def _refuse_strangers(path: Path, out: Path) -> None:
    """Refuse to write where something else lies."""
    here, there = path.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise SpecError(f"--out {out} overlaps {path}; a conversion is a store of its own, name another path")
    if out.exists() and not out.is_dir():
        raise StoreFormatError(f"--out {out} is a file; choose another path")
    if out.is_dir() and not (out / "zarr.json").exists():
        strangers = [p.name for p in out.iterdir() if not p.name.startswith(".")]
        if strangers:
            raise StoreFormatError(f"--out {out} exists and is not a feature store; choose another path")


def _bytes_of(store: Store) -> int:
    return sum(record["bytes"] for record in store.manifest.values())


def _facts(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest entry records beside its files."""
    return {key: value for key, value in entry.items() if key not in ("unit", "files")}


# The work -----------------------------------------------------------------------------------------------------------


class _Conversion:
    """What goes from one store into another, unit by unit.

    Args:
        source: The store that is read.
        before: How its rows are stored, by model.
        after: How they will be.
    """

    def __init__(self, source: Store, before: Mapping[str, Encoding], after: Mapping[str, Encoding]) -> None:
        self.source, self.before, self.after = source, before, after
        self.exact = all(after[name].keeps_values_of(before[name]) for name in after)
        metadata = source.directory / MANIFEST / f"{METADATA_UNIT}.json"
        self._documents = sorted(
            name.removesuffix("/zarr.json")
            for name in read_entry(metadata, METADATA_UNIT)["files"]
            if name != "zarr.json"
        )
        self._units = [unit for unit in StoreWriter(source.directory).unit_names() if unit != METADATA_UNIT]
        self._root = {
            **source.attributes,
            "complete": False,
            "converted_from": {
                "fingerprint": source.fingerprint,
                "models": {name: encoding.to_dict() for name, encoding in before.items()},
                "exact": self.exact,
                # A chain of conversions is told from its last link.
                "converted_from": source.attributes.get("converted_from"),
            },
        }
        if self.dropped() and source.attributes.get("moments"):
            self._root["moments"] = False

    def model_attributes(self, name: str) -> dict[str, Any]:
        """A model's attributes in the new store.

        Args:
            name: Model.
        """
        return self.source.model(name).attributes | self.after[name].to_dict()

    def refuse_another(self, writer: StoreWriter) -> None:
        """Refuse to go on with a store that is not this conversion, begun or finished.

        Args:
            writer: Of the new store; it need not exist.
        """
        own = (writer.attributes() or self._attributes(self._root)).get("featstore", {})
        same = own | {"complete": False} == self._root
        for name in self.after:
            found = writer.attributes(f"models/{name}")
            same &= found is None or found == self._attributes(self.model_attributes(name))
        if not same:
            raise StoreStateError(
                f"{writer.path} exists and is not this conversion of {self.source.path}; remove it, or choose another "
                "--out"
            )

    @staticmethod
    def _attributes(own: dict[str, Any]) -> dict[str, Any]:
        return {"featstore": own}

    def bytes_to_write(self, writer: StoreWriter) -> int:
        """Bytes that are still missing, rows counted as if nothing could be compressed.

        Args:
            writer: Of the new store; it need not exist.
        """
        total = sum(self._size(unit) for unit in self._copied() if not writer.has(unit))
        for name, encoding in self.after.items():
            arrays = self._arrays(name, {})
            a_row = encoding.form.bytes_per_row(arrays.width)
            for layer in self._row_layers(name):
                missing = [s for s in range(arrays.shards) if not writer.has(rows_unit(name, layer, s))]
                total += sum(arrays.size(shard) for shard in missing) * a_row
            if table_unit(name) in self._units and not writer.has(table_unit(name)):
                total += _plain(self.source.rows(name, 0)).rows * a_row
        return total

    def dropped(self) -> list[str]:
        """Units that are of the old values and therefore left out."""
        kept = {*self._copied(), *self._rewritten()}
        return [unit for unit in self._units if unit not in kept]

    def write(self, writer: StoreWriter, *, quiet: bool) -> None:
        """Write whatever is missing, and seal.

        Args:
            writer: Of the new store.
            quiet: No progress.
        """
        writer.group("", self._attributes(self._root))
        for name, encoding in self.after.items():
            write_groups(writer, name, encoding.form)
            writer.group(f"models/{name}", self._attributes(self.model_attributes(name)))
        for name in self._copied_documents():
            writer.describe({name: self._document(name)})
        for unit in self._copied():
            self._copy(writer, unit)
        sizes = {name: self.source.model(name).rows * len(self._row_layers(name)) for name in self.after}
        with progress("convert", sum(sizes.values()), "rows", quiet=quiet) as tick:
            for name in self.after:
                scales = {layer: self._pilot(writer, name, layer) for layer in self.source.model(name).layers}
                arrays = self._arrays(name, {layer: s for layer, s in scales.items() if s is not None})
                if table_unit(name) in self._units:
                    self._table(writer, name, arrays)
                for layer in self._row_layers(name):
                    self._rows(writer, name, layer, arrays, tick)
        writer.seal(self._attributes(self._root | {"complete": True}))

    # Which units

    def _row_layers(self, name: str) -> tuple[int, ...]:
        table = table_unit(name) in self._units
        return tuple(k for k in self.source.model(name).layers if k or not table)

    def _rewritten(self) -> Iterator[str]:
        for unit in self._units:
            kind, _, rest = unit.partition("/")
            name, _, part = rest.partition("/")
            if kind == "models" and name in self.after and part.startswith(("resid/", "pilot-", "embedding")):
                yield unit

    def _copied(self) -> list[str]:
        """Units that go over as they are."""
        rewritten = set(self._rewritten())
        timeless = {f"models/{name}/{part}" for name in self.after for part in _OF_NO_VALUE} | {"corpus"}
        return [
            unit
            for unit in self._units
            if unit not in rewritten and (self.exact or unit in timeless or unit.startswith("pairs/"))
        ]

    def _copied_documents(self) -> Iterator[str]:
        """Groups and arrays whose description goes over as it is."""
        anew = {f"models/{name}" for name in self.after}
        below = [
            f"models/{name}/{part}/"
            for name in self.after
            for part in ("resid", "norm", "origin", "median_norm", "row_scale", "column_scale", "embedding")
        ]
        dropped = self.dropped()
        above_dropped = _ancestors(dropped) - _ancestors([*self._copied(), *self._rewritten()])
        gone = (*below, *(f"{unit}/" for unit in dropped))
        for name in self._documents:
            if name not in anew and name not in above_dropped and not f"{name}/".startswith(gone):
                yield name

    # One unit

    def _document(self, name: str) -> dict[str, Any]:
        return self.source.document(name)

    def _entry(self, unit: str) -> dict[str, Any]:
        return read_entry(self.source.directory / MANIFEST / f"{unit}.json", unit)

    def _size(self, unit: str) -> int:
        return sum(record["bytes"] for record in self._entry(unit)["files"].values())

    def _copy(self, writer: StoreWriter, unit: str) -> None:
        entry = self._entry(unit)
        if writer.entry(unit) == entry:
            return
        files = {}
        for name, record in entry["files"].items():
            path = self.source.directory / name
            data = path.read_bytes() if path.is_file() else b""
            if len(data) != record["bytes"] or file_checksum(data) != record["crc32"]:
                raise CorruptDataError(
                    f"{path} is not the file that the manifest records; run `featstore verify {self.source.path}`"
                )
            files[name] = data
        writer.commit(unit, files, **_facts(entry))

    def _pilot(self, writer: StoreWriter, name: str, layer: int) -> NDArray[np.float32] | None:
        """Carry a layer's frozen statistics over; returns its column scales, if the new format has any."""
        unit, base = f"models/{name}/pilot-{layer}", f"models/{name}"
        entry = self._entry(unit)
        scale_name = f"{base}/column_scale/{layer}"
        scale: NDArray[np.float32] | None = None
        if self.after[name].form.column_scaled:
            if self.before[name].form.column_scaled:
                scale = self.source.vector(scale_name)
            else:
                scale = self._column_scale(name, layer)
        if not writer.has(unit):
            arrays = {
                f"{base}/{part}/{layer}": self.source.vector(f"{base}/{part}/{layer}")
                for part in ("origin", "median_norm")
            }
            if scale is not None:
                arrays[scale_name] = scale
            writer.vectors(unit, arrays, **_facts(entry))
        return scale

    def _column_scale(self, name: str, layer: int) -> NDArray[np.float32]:
        """As an extraction would have frozen it, but from the stored rows."""
        window = self.source.columns(name, "window")["window"]
        starts = np.searchsorted(window, np.arange(len(self.source.corpus.window_document) + 1))
        end = int(starts[pilot_windows(starts, self.source.attributes.get("segments", ()))])
        ordinary, _ = without_sinks(self.source.rows(name, layer)[0:end])
        return column_scale_of(ordinary)

    def _arrays(self, name: str, scales: Mapping[int, NDArray[np.float32]]) -> RowArrays:
        model, encoding = self.source.model(name), self.after[name]
        return RowArrays(
            rows=model.rows,
            width=model.width,
            layers=self._row_layers(name),
            shard_rows=encoding.shard_rows,
            form=encoding.form,
            layout=encoding.layout,
            column_scale=scales,
        )

    def _rows(self, writer: StoreWriter, name: str, layer: int, arrays: RowArrays, tick: Tick) -> None:
        # A layer at a time: one open shard is then all that is held in memory.
        rows = RowWriter(writer, name, replace(arrays, layers=(layer,)))
        reader, norms = _plain(self.source.rows(name, layer)), self.source.norms(name, layer)
        for start in range(0, arrays.rows, _STEP):
            end = min(start + _STEP, arrays.rows)
            if rows.missing(start, end):
                what = f"model {name!r}, layer {layer}"
                rows.put(start, layer, self._encode(name, reader, norms, (start, end), arrays, layer, what))
            rows.advance(end)
            tick(end - start)

    def _table(self, writer: StoreWriter, name: str, arrays: RowArrays) -> None:
        unit = table_unit(name)
        if writer.has(unit):
            return
        reader = _plain(self.source.rows(name, 0))
        ids, norms = (self.source.vector(f"{unit}/{part}") for part in ("id", "norm"))
        what = f"model {name!r}, layer 0 table"
        parts = [
            self._encode(name, reader, norms, (start, min(start + _STEP, reader.rows)), arrays, 0, what)
            for start in range(0, reader.rows, _STEP)
        ]
        write_table(writer, name, ids, parts, arrays, basis=str(self._entry(unit).get("basis")))

    def _encode(
        self,
        name: str,
        reader: RowReader,
        norms: NDArray[np.float32],
        span: tuple[int, int],
        arrays: RowArrays,
        layer: int,
        what: str,
    ) -> Encoded:
        chosen = slice(*span)
        if arrays.form == self.before[name].form:
            return Encoded(reader.stored(chosen), norms[chosen], reader.row_scale(np.arange(*span)))
        values = reader[chosen]
        if arrays.form.name == "float32":
            # The norms of the same values: taken anew they could differ in the last bit.
            return Encoded(values, norms[chosen])
        try:
            return arrays.form.encode(values, arrays.column_scale.get(layer))
        except NonFiniteStateError as error:
            raise NonFiniteStateError(f"{what}, counted from row {span[0]}: {error}") from error


def _ancestors(names: Iterable[str]) -> set[str]:
    """The groups above some units or arrays."""
    return {str(parent) for name in names for parent in PurePosixPath(name).parents}


def _relative_errors(source: Store, result: Store, *, quiet: bool) -> dict[str, dict[str, dict[str, float]]]:
    """How far rows moved, by model and layer, from rows spread evenly over the store."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    sites = [(name, layer) for name in source.models for layer in source.model(name).layers]
    with progress("compare", len(sites), "layers", quiet=quiet) as tick:
        for name, layer in sites:
            rows = source.model(name).rows
            count = min(rows, _SAMPLE)
            chosen = np.arange(count) * rows // count
            old, new = source.rows(name, layer)[chosen], result.rows(name, layer)[chosen]
            size = np.maximum(np.linalg.norm(old, axis=1), np.finfo(np.float32).tiny)
            error = np.linalg.norm(new - old, axis=1) / size
            found.setdefault(name, {})[str(layer)] = {"median": float(np.median(error)), "max": float(error.max())}
            tick(1)
    return found
