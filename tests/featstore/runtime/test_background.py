"""The bounded queue to the writing thread, and the copies that go through it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from featstore.extraction.forward import HostCopier, pack, unpacked
from featstore.runtime.background import Background
from featstore.store.format.elements import FORMATS, column_scale_of

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")),
]


class BrokenError(Exception):
    pass


def test_work_is_done_in_order_by_one_other_thread():
    done: list[tuple[int, int]] = []
    with Background() as queue:
        for i in range(50):
            queue.submit(lambda i=i: done.append((i, threading.get_ident())))
    assert [i for i, _ in done] == list(range(50))
    assert {thread for _, thread in done} != {threading.get_ident()}
    assert len({thread for _, thread in done}) == 1


def test_whoever_is_faster_waits_and_nothing_is_dropped():
    gate, waiting, submitted = threading.Semaphore(0), 0, 0
    done: list[int] = []

    def work() -> None:
        gate.acquire()
        done.append(1)

    with Background(depth=2) as queue:

        def produce() -> None:
            nonlocal submitted
            for _ in range(10):
                queue.submit(work)
                submitted += 1

        producer = threading.Thread(target=produce)
        producer.start()
        time.sleep(0.2)
        waiting = submitted
        for _ in range(10):
            gate.release()
        producer.join()
    assert waiting == 3  # one being worked on, two in the queue
    assert len(done) == 10


def test_an_error_reaches_the_next_submit_and_what_follows_is_not_run():
    ran: list[str] = []

    def broken() -> None:
        raise BrokenError("disk full")

    def produce() -> None:
        with Background() as queue:
            queue.submit(broken)
            for _ in range(1000):
                queue.submit(lambda: ran.append("after"))
                time.sleep(0.001)
            pytest.fail("nobody was told")

    with pytest.raises(BrokenError, match="disk full"):
        produce()
    assert ran == []


def test_an_error_in_the_last_piece_is_not_lost():
    def broken() -> None:
        raise BrokenError

    with pytest.raises(BrokenError), Background() as queue:
        queue.submit(broken)


def test_when_the_producer_is_interrupted_what_was_submitted_is_still_done():
    done: list[int] = []

    def produce() -> None:
        with Background() as queue:
            for i in range(3):
                queue.submit(lambda i=i: (time.sleep(0.05), done.append(i)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        produce()
    assert done == [0, 1, 2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMATS)
def test_rows_arrive_on_the_host_as_they_were_packed(device, form):
    """More batches than buffers, of different lengths, through the queue, as an extraction sends them."""
    kind, rng = FORMATS[form], np.random.default_rng(0)
    batches = [rng.standard_normal((rows, 24)).astype(np.float32) * 9 for rows in (100, 700, 3, 350, 1, 512, 90)]
    scale = column_scale_of(batches[1]) if kind.column_scaled else None
    on_device = None if scale is None else torch.from_numpy(scale).to(device)
    copier, arrived = HostCopier(torch.device(device)), []

    def put(copy) -> None:
        (tensors,) = copy.wait()
        encoded = unpacked(kind, tensors, str)
        arrived.append((encoded.stored.copy(), encoded.norms.copy()))
        copy.release()

    with Background() as queue:
        for batch in batches:
            packed = pack(torch.from_numpy(batch).to(device), kind, on_device)
            copy = copier.start([packed])
            queue.submit(lambda copy=copy: put(copy))
    assert len(arrived) == len(batches)
    for batch, (stored, norms) in zip(batches, arrived, strict=True):
        ours = kind.encode(batch, scale)
        np.testing.assert_array_equal(stored, ours.stored)
        np.testing.assert_allclose(norms, ours.norms, rtol=1e-5)
