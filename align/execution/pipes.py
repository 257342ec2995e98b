"""Python objects over pipes, and what a worker process does with them.

A message is a function and its arguments, or an outcome. It is pickled, as between any two processes of Python: a pipe
without a name belongs to the process that made it and to the child that inherited it, and nobody else can write to it.
Arrays follow the pickle as they lie in memory, so a large result is not copied to be sent.
"""

from __future__ import annotations

import io
import os
import signal
import struct
import threading
import traceback
from multiprocessing.reduction import ForkingPickler
from typing import Any, BinaryIO

from featstore.errors import FeatstoreError

_COUNT, _SIZE = struct.Struct("!I"), struct.Struct("!Q")


def send(pipe: BinaryIO, value: Any) -> None:
    """Write a message.

    Args:
        pipe: Buffered, for writing.
        value: Anything that can be pickled. Nothing is written if it cannot be.

    Raises:
        BrokenPipeError: The reader is gone.
        Exception: The value cannot be pickled.
    """
    buffers: list[Any] = []
    body = io.BytesIO()
    ForkingPickler(body, 5, True, buffers.append).dump(value)
    parts = [body.getbuffer(), *(buffer.raw() for buffer in buffers)]
    pipe.write(_COUNT.pack(len(parts)) + b"".join(_SIZE.pack(len(part)) for part in parts))
    pipe.writelines(parts)
    pipe.flush()


def receive(pipe: BinaryIO) -> list[bytearray]:
    """Read a message, which :func:`unpacked` makes an object again.

    Args:
        pipe: Buffered, for reading.

    Raises:
        EOFError: The writer is gone, before the message or in the middle of it.
    """
    (count,) = _COUNT.unpack(_exactly(pipe, _COUNT.size))
    sizes = [_SIZE.unpack(_exactly(pipe, _SIZE.size))[0] for _ in range(count)]
    return [_exactly(pipe, size) for size in sizes]


def unpacked(message: list[bytearray]) -> Any:
    """The object that was sent; its arrays lie in the message itself.

    Args:
        message: From :func:`receive`.

    Raises:
        Exception: It names something that cannot be imported here.
    """
    body, *buffers = message
    return ForkingPickler.loads(body, buffers=buffers)


def _exactly(pipe: BinaryIO, size: int) -> bytearray:
    room = bytearray(size)
    view, done = memoryview(room), 0
    while done < size:
        read = pipe.readinto(view[done:])  # type: ignore[attr-defined]
        if not read:
            raise EOFError
        done += read
    return room


def serve(requests: int, answers: int, life: int) -> None:
    """Carry out what comes in until there is nobody to ask: the whole life of a worker process.

    Args:
        requests: Descriptor of the pipe for reading tasks.
        answers: Descriptor of the pipe for writing ``(succeeded, result or exception)``.
        life: Descriptor of a pipe that ends when the process that asks does. A worker in the middle of a task ends with
            it, or it would write beside the next one's workers.
    """
    # Ctrl-C reaches everything on the terminal; who asks decides what becomes of the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # On stdout commands write their results.
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    with os.fdopen(requests, "rb") as incoming, os.fdopen(answers, "wb") as outgoing:
        while True:
            try:
                message = receive(incoming)
            except EOFError:
                return
            outcome = _outcome(message)
            del message
            try:
                send(outgoing, outcome)
            except BrokenPipeError:
                return
            except Exception as error:  # noqa: BLE001 - whatever pickling raises
                send(outgoing, (False, TypeError(f"a worker cannot send {outcome[1]!r:.200} ({error})")))
            del outcome


def _end_with(life: int) -> None:
    while os.read(life, 1):
        pass
    os._exit(1)


def _outcome(message: list[bytearray]) -> tuple[bool, Any]:
    try:
        function, arguments = unpacked(message)
        return True, function(*arguments)
    except FeatstoreError as error:
        return False, error
    except Exception as error:  # noqa: BLE001 - raised where the task came from
        error.add_note(f"in a worker process:\n{traceback.format_exc()}")
        return False, error
