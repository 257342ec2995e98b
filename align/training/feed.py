"""Paired rows from the loader to the device, the next batch while the current one is worked on."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from featstore.store.read.loader import PairBatch, PairBatches

Rows = tuple[Tensor, Tensor]


def rows_on(device: torch.device, batches: Generator[PairBatch]) -> Generator[Rows]:
    """Batches as float32 tensors on a device, in their order.

    On CUDA a thread widens the next batch, pins it and copies it on a stream of its own, so that the arithmetic waits
    for neither. On the CPU rows are shared, not copied: there is nothing to hide.

    Args:
        device: Where to.
        batches: From :meth:`featstore.store.read.loader.PairBatches.shuffled`; closed at the end, however that comes.
    """
    with closing(batches):
        if device.type == "cuda":
            yield from _ahead(device, batches)
        else:
            for batch in batches:
                yield torch.from_numpy(batch.x).to(device), torch.from_numpy(batch.y).to(device)


def _ahead(device: torch.device, batches: Iterator[PairBatch]) -> Generator[Rows]:
    stream = torch.cuda.Stream(device)

    def fetch() -> tuple[Rows, Any] | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            x, y = (torch.from_numpy(rows).pin_memory().to(device, non_blocking=True) for rows in batch)
            return (x, y), stream.record_event()

    with ThreadPoolExecutor(1, thread_name_prefix="device-copy") as thread:
        coming = thread.submit(fetch)
        while (fetched := coming.result()) is not None:
            coming = thread.submit(fetch)
            rows, copied = fetched
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            for part in rows:
                # Made on another stream: without this its memory could be given away while it is still read here.
                part.record_stream(current)
            yield rows


def pairs_digest(rows: PairBatches) -> str:
    """A name for the pairs themselves: the same store has others under another policy or mask.

    Args:
        rows: Whose row numbers are hashed.
    """
    total = hashlib.sha256(rows.pairs.row_source.tobytes())
    total.update(rows.pairs.row_target.tobytes())
    return f"{len(rows)}:{total.hexdigest()[:16]}"
