"""The fingerprint of a model's weights: GB/s on one core, beside reading the file and beside SHA-256.

    python benchmarks/bench_fingerprint.py --gib 2

The file is a safetensors checkpoint of random bfloat16 tensors in the shapes of a Llama block, warm in the page cache,
so that hashing is timed and not the disk; `--cold` drops it from the cache before every call. `read` copies the file
through one buffer of 4 MiB, the least that a hash of a file could cost; `sha256` hashes the same pieces of the same
mapped file; `fingerprint` is ours, with no cache of hashes. The rate a core is by CPU seconds, which other processes on
the machine do not lengthen as they do wall seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _measure import (
    at_least,
    drop_from_cache,
    figures,
    interleaved,
    judged,
    keep,
    machine,
    recorded,
    table,
    versions_of,
)
from safetensors.torch import save_file

from featstore.models.fingerprint import fingerprint

_BUFFER = 1 << 22
_PIECE = 1 << 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--runs", type=int, default=7, help="rounds that count")
    parser.add_argument("--cold", action="store_true", help="drop the file from the page cache before every call")
    parser.add_argument("--directory", type=Path, help="where to write; by default a temporary directory")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/bench_fingerprint.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        os.environ["FEATSTORE_CACHE"] = str(Path(name) / "cache")
        path = checkpoint(Path(name) / "model.safetensors", arguments.gib)
        gigabytes = path.stat().st_size / 1e9
        contenders = {
            "read": lambda: read(path),
            "sha256": lambda: sha256(path),
            "fingerprint": lambda: fingerprint([path], "m", fresh=True, quiet=True),
        }
        taken = interleaved(
            contenders, arguments.runs, before=(lambda _: drop_from_cache(path)) if arguments.cold else None
        )
        rates = []
        for _ in range(arguments.runs):
            start = time.process_time()
            contenders["fingerprint"]()
            rates.append(gigabytes / (time.process_time() - start))
        a_core = statistics.median(rates)
    rows = figures(taken, "read", gigabytes)
    state = "cold" if arguments.cold else "warm"
    print(table(f"{gigabytes:.2f} GB of safetensors, {state}, ratio to reading", rows, "GB/s"))
    print(f"  fingerprint over sha256: {rows['fingerprint']['ratio'] / rows['sha256']['ratio']:.2f}")
    goals = recorded({"fingerprint of weights, GB/s a core": at_least(1.0, *rates)})
    print(judged(goals))
    if arguments.keep:
        result = {
            "machine": machine(),
            "versions": versions_of("blake3", "safetensors"),
            "gigabytes": gigabytes,
            "cache": state,
            "gigabytes_a_core_second": a_core,
            "figures": rows,
            "goals": goals,
        }
        print(keep("bench_fingerprint", result))


def checkpoint(path: Path, gib: float) -> Path:
    """Random tensors in the shapes of a Llama block until there are so many GiB."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "up_proj": (14336, 4096), "norm": (4096,)}
    tensors, size, layer = {}, 0, 0
    while size < gib * 2**30:
        for name, shape in shapes.items():
            values = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
            tensors[f"model.layers.{layer}.{name}.weight"] = values.view(torch.bfloat16)
            size += 2 * values.numel()
        layer += 1
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def read(path: Path) -> None:
    """Copy the file, a buffer at a time."""
    buffer = memoryview(bytearray(_BUFFER))
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def sha256(path: Path) -> str:
    """Hash the mapped file by the standard library."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        pages.madvise(mmap.MADV_SEQUENTIAL)
        with memoryview(pages) as view:
            for at in range(0, len(view), _PIECE):
                with view[at : at + _PIECE] as piece:
                    hasher.update(piece)
    return hasher.hexdigest()


if __name__ == "__main__":
    main()
