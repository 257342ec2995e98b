"""How files come into being: complete, with the rights that the umask leaves, and never through a link.

A file is written aside and renamed, so that readers see the old content or the new. What lies aside has a name that
nobody can foresee and is made anew (`O_EXCL`): whoever else may write to the directory can neither wait for it with a
link nor take the name. The rename replaces a link that stands at the destination, and does not follow it. The system
takes the umask off the rights, as it does for every other program; nothing here sets rights of its own.

Folders are another matter: a link in the place of a folder would lead every file behind it elsewhere.
:func:`check_folder` makes a folder below a root that the user has named, and refuses links on the way.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO

from featstore.errors import FeatstoreError, LinkError, NoSpaceError, WriteError

_NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
#: What anybody may have of a file before the umask.
_RIGHTS = 0o666
#: Bytes of a file's name that the name aside repeats: with the rest it stays below what a directory takes.
_KEPT = 200

_AGAIN = "what was committed is kept: free some space and run the same command again"
_RIGHT = "choose a place where you may write, or have the rights changed"
_NAME = "choose another name"
_FULL = {errno.ENOSPC: _AGAIN, errno.EDQUOT: _AGAIN, errno.EFBIG: "raise the limit on file sizes (ulimit -f)"}
_REMEDIES = {
    **_FULL,
    errno.EACCES: _RIGHT,
    errno.EPERM: _RIGHT,
    errno.EROFS: _RIGHT,
    errno.ENAMETOOLONG: _NAME,
    errno.ENOTDIR: _NAME,
    errno.EISDIR: _NAME,
    errno.ELOOP: "remove the link",
}
#: How Rust, in which safetensors is written, ends what the system said.
_SYSTEM = re.compile(r"\(os error (\d+)\)")


def fsync_directory(path: Path) -> None:
    """Make a rename inside a directory survive a power cut.

    Args:
        path: The directory.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(path: Path | str, error: OSError) -> FeatstoreError:
    """What to raise where a file cannot be written: the place, what the system says, and the remedy.

    Args:
        path: The file or folder.
        error: What the system said.
    """
    kind = NoSpaceError if error.errno in _FULL else WriteError
    return kind(f"cannot write {path} ({error.strerror or error}); {remedy_of(error) or 'choose another place'}")


def system_error(error: Exception) -> OSError | None:
    """What the system said to a library that passes it on as text, ``... (os error 28)``; None for anything else.

    Args:
        error: Of the library.
    """
    found = _SYSTEM.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def remedy_of(error: OSError) -> str | None:
    """What to do about what the system refused: rights, full disks, impossible names; None for anything else.

    Args:
        error: What the system said.
    """
    return None if error.errno is None else _REMEDIES.get(error.errno)


@contextmanager
def refusing(path: Path | str) -> Iterator[None]:
    """Say in one line what the system refuses while something is written.

    Args:
        path: What is written, for errors that do not name a file.

    Raises:
        WriteError: It cannot be written.
        NoSpaceError: The disk is full.
    """
    try:
        yield
    except OSError as error:
        # Errors of libraries that stand for something else have no number.
        if isinstance(error, FeatstoreError | BlockingIOError) or error.errno is None:
            raise
        raise cannot_write(path, error) from error


def make_folder(path: Path) -> None:
    """Make a directory and those above it, as far as they are not there.

    Args:
        path: The directory.

    Raises:
        WriteError: It cannot be made.
        NoSpaceError: The disk is full.
    """
    with refusing(path):
        path.mkdir(parents=True, exist_ok=True)


def check_folder(root: Path, *names: str, make: bool = True) -> Path:
    """A folder below a root, once it is sure that nothing between the two is a link.

    Args:
        root: What the user has named; may be a link itself.
        names: Of the folders below it, one in the other; each may hold slashes.
        make: Make what is not there.

    Returns:
        The folder.

    Raises:
        LinkError: A link stands where a folder belongs.
        WriteError: The folder cannot be made.
        NoSpaceError: The disk is full.
    """
    path = root
    for name in "/".join(names).split("/"):
        path = path / name
        if path.is_symlink():
            raise LinkError(
                f"{path} is a link to {path.readlink()}, and nothing is written through links below {root}; put the "
                "folder itself there, or remove the link"
            )
    if make:
        make_folder(path)
    return path


def remove_folder(root: Path, *names: str) -> None:
    """Remove a folder below a root with all that is in it, if it is there; links in it go, and what they lead to stays.

    Args:
        root: What the user has named.
        names: As for :func:`check_folder`.

    Raises:
        LinkError: A link stands where a folder belongs.
        WriteError: Something in it cannot be removed.
    """
    path = check_folder(root, *names, make=False)
    with refusing(path), suppress(FileNotFoundError):
        shutil.rmtree(path)


def aside_of(path: Path) -> Path:
    """A name beside a file's that nobody can foresee, ``.NAME.<random>.part``.

    Args:
        path: The file.
    """
    name = os.fsdecode(os.fsencode(path.name)[:_KEPT])
    return path.with_name(f".{name}.{os.urandom(8).hex()}.part")


@contextmanager
def replacing(path: Path) -> Iterator[FileIO]:
    """Yield a new file, open for writing without a buffer, that takes its place once it is complete and on the disk.

    Args:
        path: Destination, in a directory that is there.

    Raises:
        WriteError: It cannot be written.
        NoSpaceError: The disk is full; the old content is still there.
    """
    with (
        refusing(path),
        _placed(aside_of(path), path) as aside,
        FileIO(os.open(aside, os.O_WRONLY | _NEW, _RIGHTS), "wb") as handle,
    ):
        yield handle
        os.fsync(handle.fileno())


def write_all(handle: FileIO, piece: bytes | memoryview) -> None:
    """Write all of a piece: a single call may write less.

    Args:
        handle: Open for writing, without a buffer.
        piece: Bytes.
    """
    left = memoryview(piece)
    while left:
        left = left[handle.write(left) or 0 :]


@contextmanager
def replacing_by_name(path: Path) -> Iterator[Path]:
    """Yield the name of a new file, for libraries that take names; otherwise as :func:`replacing`.

    Some libraries put a file of their own there that its owner alone may read: it gets the rights of any new file.

    Args:
        path: Destination, in a directory that is there.

    Raises:
        WriteError: It cannot be written.
        NoSpaceError: The disk is full; the old content is still there.
    """
    with refusing(path), _placed(aside_of(path), path) as aside:
        rights = _create(aside)
        yield aside
        aside.chmod(rights)
        _sync(aside)


@contextmanager
def _placed(aside: Path, path: Path) -> Iterator[Path]:
    """Rename what the body makes aside into place, or remove it."""
    try:
        yield aside
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def _create(path: Path) -> int:
    """Make an empty file; returns the rights it got."""
    handle = os.open(path, os.O_WRONLY | _NEW, _RIGHTS)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def probe_folder(folder: Path) -> None:
    """Make a file in a folder and remove it, to see that files can be made there.

    Args:
        folder: The folder.

    Raises:
        OSError: No file can be made there.
    """
    probe = aside_of(folder / "probe")
    _create(probe)
    probe.unlink()


def settle(folder: Path) -> None:
    """Give the files of a new folder the rights of any new file, and wait until they are on the disk.

    Args:
        folder: Holds files, whoever wrote them.
    """
    probe = aside_of(folder / "rights")
    rights = _create(probe)
    probe.unlink()
    for path in folder.iterdir():
        path.chmod(rights)
        _sync(path)


def open_log(path: Path) -> IO[bytes]:
    """Open a file to read it and to append to it; made if there is none, never through a link.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be opened, or is a link.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, _RIGHTS), "a+b")


def append_text(path: Path, text: str) -> None:
    """Append to a file, or begin it.

    Args:
        path: The file.
        text: Written as UTF-8.

    Raises:
        WriteError: It cannot be written, or is a link.
        NoSpaceError: The disk is full.
    """
    with refusing(path), open_log(path) as file:
        file.write(text.encode())


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock, which goes with the process. The file stays, and what is in it.

    Args:
        path: The lock's file; made if there is none, in a directory that is there.
        wait: Wait for whoever holds it.

    Raises:
        BlockingIOError: Another process holds it, and ``wait`` is false.
        LinkError: The file is a link.
        WriteError: It is no ordinary file, or may not be written to.
    """
    try:
        # Without waiting, should it be a pipe.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(path, flags, _RIGHTS)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise LinkError(
                f"{path} is a link to {path.readlink()}, and a lock is not taken through one; remove it"
            ) from error
        raise cannot_write(path, error) from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise WriteError(f"{path} is no ordinary file, which a lock needs to be; remove it")
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def remove_asides(root: Path) -> None:
    """Remove what killed writers left aside below a root, in its own folders; call it under the root's lock.

    Args:
        root: The directory.
    """
    folders = [str(root)]
    while folders:
        # Not os.walk: a store has a folder for every shard, and this takes half the time.
        with suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.name.startswith(".") and entry.name.endswith(".part"):
                    Path(entry.path).unlink(missing_ok=True)
