"""The mapped and the portable road give the same numbers, from disk, memory and object stores; so do other tools."""

from __future__ import annotations

import asyncio
import builtins
import http.server
import json
import pickle
import re
import shutil
import tempfile
import threading
import urllib.parse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.storage import LocalStore, MemoryStore, ObjectStore

from featstore.errors import (
    CorruptDataError,
    MissingPackageError,
    SpecError,
    StoreAccessError,
    StoreFormatError,
    StoreNotFoundError,
    StoreStateError,
)
from featstore.runtime.provenance import write_json
from featstore.store import Store, open_store
from featstore.store.format import documents, shards
from featstore.store.format.elements import FORMATS, parse_format
from featstore.store.format.shards import LAYOUTS, Layout
from featstore.store.read import portable
from featstore.store.read import rows as rows_module
from featstore.store.read.portable import PortableFiles, PortableRows
from featstore.store.read.rows import RowReader
from featstore.store.read.tables import TableReader
from featstore.store.write.content import padded_chunk
from featstore.store.write.row_writer import RowArrays
from featstore.store.write.table import write_table
from featstore.store.write.writer import StoreWriter
from tests.support.store_fixtures import Recipe, write_quickly

FORMS = tuple(FORMATS)
KINDS = [(form, layout) for form in FORMS for layout in LAYOUTS]


@pytest.fixture(scope="session")
def stores(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """One store of every format and layout, with several shards and a part-filled last chunk; layer 0 is a table."""
    root = tmp_path_factory.mktemp("portable")
    result = {}
    for form, layout in KINDS:
        recipe = Recipe(form=form, layout=layout, shard_rows=1024, documents=20, layers=(0, 2))
        result[form, layout] = with_table(write_quickly(root / f"{layout}-{form}.zarr", recipe))
    return result


@pytest.fixture
def copied(stores, tmp_path) -> Path:
    """A store that a test may damage."""
    return Path(shutil.copytree(stores["int8", "archive"], tmp_path / "copy.zarr"))


def with_table(path: Path) -> Path:
    """The same store with new states of layer 0, one for every token id, as a table."""
    store, writer = open_store(path), StoreWriter(path)
    for model in store.models:
        base = path / "models" / model
        reader = store.rows(model, 0)
        assert isinstance(reader, RowReader)
        shutil.rmtree(path / "manifest" / "models" / model / "resid" / "0")
        for kind in ("resid", "norm", "row_scale"):
            shutil.rmtree(base / kind / "0", ignore_errors=True)
        ids = np.unique(store.tokens(model).id)
        values = np.random.default_rng(len(ids)).standard_normal((len(ids), reader.width)).astype(np.float32)
        scale = np.full(reader.width, 0.5, np.float32)
        if reader.form.column_scaled:
            writer.vectors(f"models/{model}/scale-0", {f"models/{model}/column_scale/0": scale})
        arrays = RowArrays(len(ids), reader.width, (0,), reader.shard_rows, reader.form, reader.layout, {0: scale})
        write_table(writer, model, ids, [reader.form.encode(values, scale)], arrays, basis="tests")
    writer.seal({"featstore": store.attributes})
    return path


def everything(store: Store) -> dict[str, np.ndarray]:
    """Every array a store gives out."""
    found = {f"corpus {name}": value for name, value in vars(store.corpus).items() if isinstance(value, np.ndarray)}
    for model in store.models:
        found |= {f"{model} {name}": column for name, column in vars(store.tokens(model)).items()}
        found[f"{model} medians"] = np.array(list(store.median_norms(model).values()))
        for layer in store.model(model).layers:
            reader = store.rows(model, layer)
            found[f"{model} stored {layer}"], found[f"{model} rows {layer}"] = reader.stored(slice(None)), reader[:]
            found[f"{model} norms {layer}"], found[f"{model} origin {layer}"] = (
                store.norms(model, layer),
                store.origin(model, layer),
            )
    pairs = store.pairs(*store.models)
    return found | {f"pairs {name}": value for name, value in vars(pairs).items() if isinstance(value, np.ndarray)}


def assert_same(one: Store, other: Store) -> None:
    mine, theirs = everything(one), everything(other)
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert array.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    assert one.manifest == other.manifest
    assert one.fingerprint == other.fingerprint
    assert one.attributes == other.attributes


def into_memory(path: Path) -> MemoryStore:
    """A store's files in zarr-python's memory store."""
    buffer = zarr.core.buffer.default_buffer_prototype().buffer
    files = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return MemoryStore({name: buffer.from_bytes(data) for name, data in files.items()}, read_only=True)


# Rows ---------------------------------------------------------------------------------------------------------------


@st.composite
def arrays(draw) -> tuple[Any, ...]:
    """Rows of any shape, format and chunking, and a few choices among them."""
    form = parse_format(draw(st.sampled_from(FORMS)))
    chunk_rows = draw(st.integers(1, 7))
    layout = Layout("", chunk_rows, compressed=draw(st.booleans()))
    shard_rows = chunk_rows * draw(st.integers(1, 4))
    rows, width = draw(st.integers(1, 60)), draw(st.integers(1, 5))
    number = st.integers(0, rows - 1)
    choices = draw(st.lists(st.slices(rows) | st.lists(number, max_size=30), min_size=1, max_size=6))
    return form, layout, shard_rows, rows, width, choices, draw(st.integers(0, 2**32 - 1))


@given(case=arrays())
def test_mapped_and_portable_rows_are_those_that_were_written(case):
    form, layout, shard_rows, rows, width, choices, seed = case
    values = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32) * 3
    columns = np.linspace(0.5, 2, width, dtype=np.float32)
    encoded = form.encode(values, columns)
    decoded = form.decode(encoded.stored, encoded.row_scale, columns)
    document = documents.rows_document(rows, width, shard_rows, form, layout)
    scale_document = documents.vector_document(np.empty(rows, np.float32), shard_rows)
    # A row or a few of a piece, where rows are gathered out of order.
    with tempfile.TemporaryDirectory() as directory, mock.patch.object(rows_module, "_PIECE_BYTES", 20):
        root = Path(directory)
        for shard, start in enumerate(range(0, rows, shard_rows)):
            part = encoded.part(start, min(start + shard_rows, rows))
            place(root / "rows" / "c" / str(shard) / "0", shards.encode_shard(part.stored, shard_rows, layout))
            if part.row_scale is not None:
                place(root / "scale" / "c" / str(shard), padded_chunk(part.row_scale, shard_rows))
        mapped = RowReader(root / "rows", document, root / "scale", columns)
        store = LocalStore(root, read_only=True)
        scales = ("scale", scale_document) if form.row_scaled else None
        through_zarr = PortableRows(store, ("rows", document), scales, columns)
        for choice in choices:
            index = choice if isinstance(choice, slice) else np.array(choice, np.int64)
            for reader in (mapped, through_zarr):
                np.testing.assert_array_equal(reader.stored(choice), encoded.stored[index])
                out = np.full_like(encoded.stored[index], 77)
                assert reader.stored(choice, out=out) is out
                np.testing.assert_array_equal(out, encoded.stored[index])
                np.testing.assert_array_equal(reader[choice], decoded[index])
                assert (reader.shape, reader.form, reader[choice].dtype) == ((rows, width), form, np.float32)
        for number in range(-(-rows // layout.chunk_rows)):
            own = encoded.stored[number * layout.chunk_rows : (number + 1) * layout.chunk_rows]
            for reader in (mapped, through_zarr):
                np.testing.assert_array_equal(reader.chunk(number)[: len(own)], own)


def place(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


@pytest.mark.parametrize("way", ["mapped", "portable"])
class TestRows:
    def test_what_out_must_be(self, stores, way):
        reader = open_store(stores["bfloat16", "hot"], portable=way == "portable").rows("a", 2)
        good = np.empty((5, reader.width), np.uint16)
        locked = good.copy()
        locked.flags.writeable = False
        for bad in (good[:4], good.view(np.int16), np.asfortranarray(good), np.repeat(good, 2, axis=0)[::2], locked):
            for choice in (slice(0, 5), [4, 3, 2, 1, 0]):
                with pytest.raises(SpecError, match=r"it must be writable, C-contiguous, uint16 \(5, 8\)"):
                    reader.stored(choice, out=bad)

    def test_a_chunk_or_row_that_does_not_exist(self, stores, way):
        reader = open_store(stores["float32", "archive"], portable=way == "portable").rows("a", 2)
        last = (reader.rows - 1) // 256
        assert len(reader.chunk(last)) >= reader.rows - last * 256
        for number in (-1, last + 1):
            with pytest.raises(IndexError, match=rf"chunk {number} is outside 0\.\.{last}"):
                reader.chunk(number)
        with pytest.raises(IndexError, match=rf"row {reader.rows} is outside"):
            reader.stored([reader.rows])
        with pytest.raises(IndexError, match=r"by number, not by bool; for a mask use np\.flatnonzero"):
            reader.stored(np.ones(reader.rows, bool))

    def test_no_rows(self, stores, way):
        reader = open_store(stores["fp8", "archive"], portable=way == "portable").rows("a", 2)
        for nothing in ([], slice(0, 0), slice(9, 3), slice(10**9, None)):
            assert reader.stored(nothing).shape == reader[nothing].shape == (0, 8)

    def test_layer_0_is_a_table(self, stores, way):
        store = open_store(stores["int8", "hot"], portable=way == "portable")
        reader, ids = store.rows("a", 0), store.tokens("a").id
        assert isinstance(reader, TableReader)
        assert isinstance(reader.table, PortableRows) == (way == "portable")
        first, second = np.flatnonzero(ids == np.bincount(ids).argmax())[:2]
        np.testing.assert_array_equal(reader[[first]], reader[[second]])
        np.testing.assert_allclose(np.linalg.norm(reader[:], axis=1), store.norms("a", 0), rtol=1e-5)


def test_an_archive_chunk_is_decoded_only_into_memory_of_its_size(copied):
    """The decoder itself would write past a smaller array, and leave part of a larger one as it was."""
    store = open_store(copied)
    reader = store.rows("a", 2)
    short = RowReader(reader.path, json.loads((reader.path / "zarr.json").read_text()), copied / "nothing")
    short.width = 7
    for choice in (slice(0, 256), slice(0, 3), [1, 2]):
        with pytest.raises(CorruptDataError, match=r"chunk 0 does not decompress \(its header does not fit"):
            short.stored(choice)


# Stores -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_whole_store_is_the_same_through_zarr_python(stores, kind):
    mapped, through_zarr = open_store(stores[kind]), open_store(str(stores[kind]), portable=True)
    assert isinstance(through_zarr.rows("b", 2), PortableRows)
    assert not isinstance(mapped.rows("b", 2), PortableRows)
    assert mapped.path == through_zarr.path == through_zarr.directory == stores[kind]
    assert_same(mapped, through_zarr)


def test_memory(stores):
    path = stores["fp8", "hot"]
    store = open_store(into_memory(path))
    assert_same(open_store(path), store)
    assert store.path.startswith("memory://")
    with pytest.raises(StoreStateError, match=r"memory://\d+ is not a directory on this machine; copy the store here"):
        store.directory  # noqa: B018


def test_a_url_of_fsspec(stores):
    import fsspec

    path = stores["int8", "archive"]
    memory = fsspec.filesystem("memory")
    try:
        for file in path.rglob("*"):
            if file.is_file():
                memory.pipe(f"/bucket/{file.relative_to(path).as_posix()}", file.read_bytes())
        store = open_store("memory://bucket")
        assert_same(open_store(path), store)
        assert store.path == "memory://bucket"
        # A command's --store has been through Path, which takes one slash away.
        assert open_store(Path("memory://bucket/")).path == "memory://bucket"
        with pytest.raises(StoreFormatError, match="'memory://nothing' is not a feature store: it has no"):
            open_store("memory://nothing")
    finally:
        memory.rm("/", recursive=True)


class Bucket(http.server.BaseHTTPRequestHandler):
    """As much of an object store as a reader asks for: objects, byte ranges, listings by prefix."""

    root: Path
    refuse = False

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        name = urllib.parse.unquote(url.path).removeprefix("/bucket").strip("/")
        if self.refuse:
            self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        elif not name:
            self.answer(200, self.listing(urllib.parse.parse_qs(url.query).get("prefix", [""])[0]))
        elif not (self.root / name).is_file():
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self.object((self.root / name).read_bytes())

    do_HEAD = do_GET  # noqa: N815 - the base class looks for this name

    def object(self, data: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.answer(200, data)
        first, last = asked.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        end = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= end:
            return self.answer(416, b"<Error><Code>InvalidRange</Code></Error>")
        return self.answer(206, data[start:end], f"bytes {start}-{end - 1}/{len(data)}")

    def listing(self, prefix: str) -> bytes:
        names = sorted(p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file())
        entries = "".join(
            f"<Contents><Key>{name}</Key><Size>1</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for name in names
            if name.startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()

    def answer(self, status: int, body: bytes, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("ETag", '"x"')
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def bucket(stores, tmp_path, monkeypatch) -> Iterator[type[Bucket]]:
    """A bucket on this machine; its keys are nobody's."""
    serve = type("Serve", (Bucket,), {"root": tmp_path / "bucket"})
    shutil.copytree(stores["bfloat16", "archive"], tmp_path / "bucket" / "deep" / "s.zarr")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    settings = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "nowhere",
        "AWS_SKIP_SIGNATURE": "true",
        "GOOGLE_BASE_URL": address,
        "GOOGLE_SKIP_SIGNATURE": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield serve
    server.shutdown()
    thread.join()
    server.server_close()


class TestObjectStores:
    def test_s3(self, stores, bucket):
        store = open_store("s3://bucket/deep/s.zarr")
        assert store.path == "s3://bucket/deep/s.zarr"
        assert_same(open_store(stores["bfloat16", "archive"]), store)
        reader = store.rows("a", 2)
        assert str(reader.path) == "s3://bucket/deep/s.zarr/models/a/resid/2"

    def test_gs(self, stores, bucket):
        reader = open_store("gs://bucket/deep/s.zarr").rows("a", 2)
        np.testing.assert_array_equal(reader[::-3], open_store(stores["bfloat16", "archive"]).rows("a", 2)[::-3])

    def test_a_store_of_obstore(self, stores, bucket):
        import obstore

        through_obstore = ObjectStore(obstore.store.LocalStore(stores["float16", "hot"]), read_only=True)
        assert_same(open_store(stores["float16", "hot"]), open_store(through_obstore))

    def test_damage(self, bucket):
        shard = bucket.root / "deep/s.zarr/models/a/resid/2/c/1/0"
        whole = shard.read_bytes()
        for data in (flipped(whole, 30), flipped(whole, len(whole) - 9), whole[:-1], whole[:40]):
            shard.write_bytes(data)
            with pytest.raises(CorruptDataError, match=r"s3://bucket/deep/s\.zarr/models/a/resid/2"):
                open_store("s3://bucket/deep/s.zarr").rows("a", 2).stored(slice(None))
        shard.unlink()
        with pytest.raises(CorruptDataError, match="c/1/0 is missing"):
            open_store("s3://bucket/deep/s.zarr").rows("a", 2).stored(slice(None))

    def test_nothing_there_or_no_access(self, bucket):
        with pytest.raises(StoreFormatError, match="is not a feature store: it has no zarr"):
            open_store("s3://bucket/other.zarr")
        store = open_store("s3://bucket/deep/s.zarr")
        bucket.refuse = True
        message = r"s3://bucket/deep/s.zarr/.* cannot be read \(.*\); check URL, login and network"
        with pytest.raises(StoreAccessError, match=message):
            open_store("s3://bucket/deep/s.zarr")
        for use in (lambda: store.rows("a", 2)[:], lambda: store.manifest, lambda: store.norms("a", 2)):
            with pytest.raises(StoreAccessError, match=message) as caught:
                use()
            assert "\n" not in str(caught.value)

    def test_access_that_ends_while_rows_are_read(self, bucket):
        reader = open_store("s3://bucket/deep/s.zarr").rows("a", 2)
        reader.stored([0])
        bucket.refuse = True
        with pytest.raises(StoreAccessError, match="resid/2 cannot be read"):
            reader.stored([0])

    @pytest.mark.parametrize("scheme", ["s3", "gs"])
    def test_a_missing_package_is_named(self, monkeypatch, scheme):
        monkeypatch.setattr(portable, "find_spec", lambda name: None)
        hide(monkeypatch, "s3fs", "gcsfs")
        with pytest.raises(
            MissingPackageError, match=rf"'{scheme}://bucket/x' .* run `pip install 'featstore\[cloud\]'`"
        ):
            open_store(f"{scheme}://bucket/x")

    def test_a_missing_package_of_fsspec_is_named(self, monkeypatch):
        hide(monkeypatch, "paramiko")
        with pytest.raises(MissingPackageError, match="fsspec package for sftp://"):
            open_store("sftp://host/x")

    @pytest.mark.parametrize("url", ["nope://bucket/x", "az://", "s3://"])
    def test_a_url_that_means_nothing(self, url):
        with pytest.raises((SpecError, StoreAccessError, StoreNotFoundError), match=re.escape(url.rstrip("/"))):
            open_store(url)


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make imports of packages fail, installed or not."""
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in names:
            raise ImportError(f"no {name}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_a_directory_that_is_named_like_a_url_is_a_directory(stores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stores["float32", "hot"], tmp_path / "s3:" / "bucket")
    assert open_store("s3://bucket").path == Path("s3:/bucket")


def test_nothing_there_portably(tmp_path):
    with pytest.raises(StoreNotFoundError, match=r"no store at '.*x\.zarr'; create one with `featstore extract"):
        open_store(tmp_path / "x.zarr", portable=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("empty", "file"):
        with pytest.raises(StoreFormatError, match=r"no zarr\.json"):
            open_store(tmp_path / name, portable=True)


@pytest.mark.parametrize("way", ["mapped", "portable", "memory"])
def test_a_pickled_store_is_its_place(stores, tmp_path, monkeypatch, way):
    monkeypatch.chdir(stores["int8", "hot"].parent)
    path = Path(stores["int8", "hot"].name)
    store = open_store(into_memory(path)) if way == "memory" else open_store(path, portable=way == "portable")
    expected = store.rows("a", 2)[5:9]
    pickled = pickle.dumps(store)
    if way != "memory":
        assert len(pickled) < 1000
    # The directory was given relative to where this process was.
    monkeypatch.chdir(tmp_path)
    again = pickle.loads(pickled)
    np.testing.assert_array_equal(again.rows("a", 2)[5:9], expected)
    assert isinstance(again.rows("a", 2), PortableRows) == (way != "mapped")
    assert (again is pickle.loads(pickled)) == (way != "memory")


def test_a_store_that_was_sealed_anew_is_not_taken_for_the_one_before(copied):
    def through_pickle() -> Store:
        return pickle.loads(pickle.dumps(open_store(copied)))  # type: ignore[no-any-return]

    first = through_pickle()
    assert through_pickle() is first
    StoreWriter(copied).seal({"featstore": first.attributes | {"note": "new"}})
    assert through_pickle().attributes["note"] == "new"


# Damage -------------------------------------------------------------------------------------------------------------


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_damage_is_refused_on_both_roads(copied):
    """Every file of one model's rows: bits flipped in chunks, indexes and scales, files cut, emptied, gone."""
    names = sorted(p.relative_to(copied).as_posix() for p in (copied / "models" / "a").rglob("*") if p.is_file())
    rows = [name for name in names if "/c/" in name and re.search("resid|scale|embedding|norm", name)]
    assert len(rows) > 15
    for name in rows:
        whole = (copied / name).read_bytes()
        for data in (flipped(whole, len(whole) // 3), flipped(whole, len(whole) - 6), whole[:-1], b"", None):
            if data is None:
                (copied / name).unlink()
            else:
                (copied / name).write_bytes(data)
            for way in (False, True):
                with pytest.raises(CorruptDataError, match=name.partition("/c/")[0]):
                    everything(open_store(copied, portable=way))
        (copied / name).write_bytes(whole)
    everything(open_store(copied, portable=True))


def test_a_chunk_that_its_shard_does_not_name_is_refused_on_both_roads(tmp_path):
    """zarr-python reads it as zeros."""
    layout = Layout("archive", 4, compressed=True)
    document = documents.rows_document(16, 3, 8, FORMATS["float32"], layout)
    values = np.ones((16, 3), np.float32)
    write_json(tmp_path / "zarr.json", document)
    place(tmp_path / "c/0/0", shards.encode_shard(values[:8], 8, layout))
    place(tmp_path / "c/1/0", shards.encode_shard(values[:4], 8, layout))
    assert not zarr.open_array(tmp_path, mode="r")[12:].any()
    mapped = RowReader(tmp_path, document)
    through_zarr = PortableRows(LocalStore(tmp_path.parent, read_only=True), (tmp_path.name, document))
    for reader in (mapped, through_zarr):
        assert reader.stored(slice(0, 12)).all()
        for choice in (slice(11, 13), [1, 15]):
            with pytest.raises(CorruptDataError, match="chunk 3 is missing from its shard"):
                reader.stored(choice)


@pytest.mark.parametrize("name", ["models/a/resid/2/zarr.json", "models/a/row_scale/2/zarr.json", "zarr.json"])
def test_a_changed_document_is_refused_on_both_roads(copied, name):
    document = json.loads((copied / name).read_text())
    if "shape" in document:
        document["shape"][0] -= 1
    else:
        document["attributes"]["featstore"]["window_bytes"] += 1
    (copied / name).write_text(json.dumps(document))
    for way in (False, True):
        with pytest.raises(CorruptDataError, match=f"{name} is not the document that the manifest records"):
            everything(open_store(copied, portable=way))


def test_a_manifest_that_points_outside_is_refused_portably(copied):
    entry = {"unit": "evil", "files": {"../outside": {"bytes": 1, "crc32": "00000000"}}}
    (copied / "manifest" / "evil.json").write_text(json.dumps(entry))
    # The sorted index tells what was sealed; without it every entry is read.
    assert "../outside" not in open_store(copied, portable=True).manifest
    (copied / "manifest" / "index").unlink()
    with pytest.raises(CorruptDataError, match="not a file of this store; do not trust it"):
        open_store(copied, portable=True).manifest  # noqa: B018


def test_documents_are_fetched_together(stores):
    """An object store answers in tens of milliseconds; a store has hundreds of manifest documents."""
    path = stores["float32", "hot"]

    class Slow(LocalStore):
        open_now = most = 0

        async def get(self, *args: Any, **kwargs: Any) -> Any:
            Slow.open_now += 1
            Slow.most = max(Slow.most, Slow.open_now)
            await asyncio.sleep(0.005)
            Slow.open_now -= 1
            return await super().get(*args, **kwargs)

    files = PortableFiles(Slow(path, read_only=True), path, None)
    with mock.patch.object(portable, "_REQUESTS", 8):
        found = files.manifest()
    assert {f"manifest/{unit}.json" for unit in found} == {
        p.relative_to(path).as_posix() for p in (path / "manifest").rglob("*.json")
    }
    assert Slow.most == 8


# Other tools --------------------------------------------------------------------------------------------------------


def as_payload(values: Any, like: np.ndarray) -> np.ndarray:
    """Another library's numbers as the bits that carry them."""
    return np.ascontiguousarray(values).view(like.dtype)


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
class TestOtherTools:
    def arrays(self, path: Path) -> list[tuple[Path, np.ndarray]]:
        store = open_store(path)
        table = store.rows("b", 0)
        assert isinstance(table, TableReader)
        return [
            (path / "models/b/resid/2", store.rows("b", 2).stored(slice(None))),
            (path / "models/b/embedding/state", table.table.stored(slice(None))),
        ]

    def test_zarr_python(self, stores, kind):
        for path, ours in self.arrays(stores[kind]):
            array = zarr.open_array(path, mode="r")
            np.testing.assert_array_equal(as_payload(array[:], ours), ours)
            np.testing.assert_array_equal(as_payload(array[70:300], ours), ours[70:300])

    def test_zarrs(self, stores, kind):
        """The Rust pipeline of zarr-python, told not to fall back on Python. It does not know float8."""
        from zarrs.pipeline import UnsupportedMetadataError

        strict = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
        for path, ours in self.arrays(stores[kind]):
            if kind[0] == "fp8":
                with zarr.config.set(strict), pytest.raises(UnsupportedMetadataError) as caught:
                    zarr.open_array(path, mode="r")
                assert str(caught.value.__cause__) == "data type float8_e4m3fn is not supported"
                # As it comes, it says so and leaves the array to zarr-python.
                with zarr.config.set(strict | {"codec_pipeline.strict": False}), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=r".*float8_e4m3fn is not supported", category=UserWarning)
                    np.testing.assert_array_equal(zarr.open_array(path, mode="r")[:], ours)
                continue
            with zarr.config.set(strict):
                array = zarr.open_array(path, mode="r")
                assert type(array._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
                np.testing.assert_array_equal(as_payload(array[:], ours), ours)
                np.testing.assert_array_equal(as_payload(array[70:300], ours), ours[70:300])
        assert "zarrs" not in zarr.config.get("codec_pipeline.path")

    def test_zarrs_under_the_portable_reader(self, stores, kind):
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*float8_e4m3fn is not supported", category=UserWarning)
            reader = open_store(stores[kind], portable=True).rows("b", 2)
            assert isinstance(reader, PortableRows)
            assert type(reader.array._async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
            mapped = open_store(stores[kind]).rows("b", 2)
            for choice in (slice(70, 300), slice(None, None, -7), [5, 2, 5, 400]):
                np.testing.assert_array_equal(reader[choice], mapped[choice])

    def test_tensorstore(self, stores, kind):
        import tensorstore

        for path, ours in self.arrays(stores[kind]):
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
            array = tensorstore.open(spec, open=True).result()
            assert array.dtype.name == FORMATS[kind[0]].data_type
            np.testing.assert_array_equal(as_payload(array.read().result(), ours), ours)
            np.testing.assert_array_equal(as_payload(array[70:300].read().result(), ours), ours[70:300])
