"""A hash over every byte of a model's weights as they lie on disk, and what two of them say about two models.

Of safetensors the tensors count (name, dtype, shape, bytes), sorted by name: other shards or another header do not make
another model, any other byte does. Of every other format the whole file counts. An adapter that is applied counts with
its tensors and its configuration, whose scale changes the model as much as its tensors do.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featstore.errors import CorruptDataError, WeightsError
from featstore.runtime.caches import cache_directory
from featstore.runtime.console import Tick, progress
from featstore.runtime.provenance import canonical_json, digest, read_json, write_json

#: Names the scheme; a fingerprint without it is a sample of values, as stores recorded before there was this one.
SCHEME = "blake3:"
#: Bytes hashed between two signs of progress.
_PIECE = 1 << 24
#: Below this many bytes nobody waits long enough to want progress.
_LARGE = 1_000_000_000
#: Entries of an adapter's configuration that do not change what it does.
_IDLE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")


@dataclass(frozen=True)
class Weights:
    """What is known of a model's weights.

    Attributes:
        whole: Fingerprint over every byte on disk, with its scheme; None for a model that lies nowhere.
        sample: Fingerprint of a few values of every tensor as loaded; None where they cannot be read.
    """

    whole: str | None = None
    sample: str | None = None

    @classmethod
    def recorded(cls, entry: Mapping[str, Any]) -> Weights:
        """What a store's attributes or a card's entry say; those from before there was a whole one name a sample.

        Args:
            entry: Has ``weights_fingerprint`` and ``weights_sample``, or lacks them.
        """
        named, sample = entry.get("weights_fingerprint"), entry.get("weights_sample")
        if named is not None and not str(named).startswith(SCHEME):
            return cls(None, str(named))
        return cls(None if named is None else str(named), None if sample is None else str(sample))

    def to_dict(self) -> dict[str, str | None]:
        """The entries of a store's attributes."""
        return {"weights_fingerprint": self.whole, "weights_sample": self.sample}

    def against(self, other: Weights) -> tuple[str, str] | None:
        """The two fingerprints that decide whether the weights are the same; None where nothing can be compared.

        Args:
            other: Of the model at hand.
        """
        if self.whole and other.whole:
            return self.whole, other.whole
        if self.sample and other.sample:
            return self.sample, other.sample
        return None

    def differ(self, other: Weights) -> bool:
        """Whether the weights are known to be others.

        Args:
            other: Of the model at hand.
        """
        compared = self.against(other)
        return compared is not None and compared[0] != compared[1]

    def same(self, other: Weights) -> bool:
        """Whether the weights are known to be the same.

        Args:
            other: Of another model.
        """
        compared = self.against(other)
        return compared is not None and compared[0] == compared[1]


#: Of a model of which nothing is known.
UNKNOWN = Weights()


def fingerprint(
    files: Sequence[Path],
    label: str,
    *,
    adapter: tuple[Mapping[str, Any], Sequence[Path]] | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> str:
    """Hash weight files, or recall the hash of files that have not changed since.

    Args:
        files: The model's weight files.
        label: The model's name, for progress.
        adapter: Configuration and weight files of an adapter that is applied to it.
        fresh: Hash again, whatever the cache says.
        quiet: No progress.

    Returns:
        ``blake3:`` and 64 hexadecimal digits.

    Raises:
        WeightsError: A safetensors file is damaged.
        OSError: A file cannot be read.
    """
    config = {k: v for k, v in adapter[0].items() if k not in _IDLE} if adapter else None
    both = [*files, *(adapter[1] if adapter else ())]
    state = {"files": {str(path.resolve()): _state(path) for path in both}, "adapter": config}
    # One document a model: what was changed in place takes the place of what it was.
    memory = cache_directory() / "fingerprints" / f"{digest(sorted(state['files'] or ()))[:32]}.json"
    known = None if fresh else _recalled(memory, state)
    if known is not None:
        return known
    size = sum(path.stat().st_size for path in both)
    with progress(f"fingerprint {label}", size / 1e9, "GB", quiet=quiet or size < _LARGE) as tick:
        content: dict[str, Any] = _content(files, tick)
        if adapter:
            content["adapter"] = {"config": config, **_content(adapter[1], tick)}
    # Only here: who compares fingerprints need not be able to make one.
    from blake3 import blake3

    found = SCHEME + blake3(canonical_json(content).encode()).hexdigest()
    _remember(memory, state, found)
    return found


def _state(path: Path) -> list[int]:
    """What changes when a file does: size, times in nanoseconds, inode."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _recalled(memory: Path, state: dict[str, Any]) -> str | None:
    try:
        entry = read_json(memory)
    except (OSError, CorruptDataError):
        return None
    found = entry.get("fingerprint")
    return found if entry.get("state") == state and isinstance(found, str) and found.startswith(SCHEME) else None


def _remember(memory: Path, state: dict[str, Any], found: str) -> None:
    """Write the cache; where that cannot be done, the next command hashes again."""
    try:
        write_json(memory, {"state": state, "fingerprint": found})
    except OSError:
        return


def _content(files: Sequence[Path], tick: Tick) -> dict[str, list[Any]]:
    """Hashes of what the files hold, in an order that does not depend on how it was cut into files."""
    tensors: list[list[Any]] = []
    whole: list[str] = []
    for path in files:
        with _mapped(path) as data:
            if path.suffix == ".safetensors":
                tensors += _tensors(path, data, tick)
            else:
                whole.append(_hash(data, tick))
    return {"tensors": sorted(tensors), "files": sorted(whole)}


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    """A file's bytes; pages come as they are hashed, and no copy is made."""
    with path.open("rb") as stream:
        if not path.stat().st_size:
            yield memoryview(b"")
            return
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            if hasattr(mmap, "MADV_SEQUENTIAL"):
                pages.madvise(mmap.MADV_SEQUENTIAL)
            with memoryview(pages) as view:
                yield view


def _hash(data: memoryview, tick: Tick) -> str:
    from blake3 import blake3

    hasher = blake3(max_threads=1)
    for at in range(0, len(data), _PIECE):
        with data[at : at + _PIECE] as piece:
            hasher.update(piece)
            tick(len(piece) / 1e9)
    return hasher.hexdigest()


def _tensors(path: Path, data: memoryview, tick: Tick) -> list[list[Any]]:
    """Name, dtype, shape and hash of every tensor of a safetensors file."""
    found = []
    for name, entry, first, end in _header(path, data):
        with data[first:end] as piece:
            found.append([name, str(entry["dtype"]), list(entry["shape"]), _hash(piece, tick)])
    return found


def _header(path: Path, data: memoryview) -> list[tuple[str, Mapping[str, Any], int, int]]:
    """Entries of a safetensors file in the order of their bytes, with where these begin and end in the file."""
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(bytes(data[8:start]))
        spans = [
            (str(name), entry, start + int(entry["data_offsets"][0]), start + int(entry["data_offsets"][1]))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise WeightsError(f"{path} is no safetensors file ({error}); download or save it again") from error
    if any(not start <= first <= end <= len(data) for _, _, first, end in spans):
        raise WeightsError(f"{path} is cut short: its header names more bytes than it has; download or save it again")
    return sorted(spans, key=lambda span: span[2])
