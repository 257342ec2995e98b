"""What is released: a wheel with everything in it, a source archive that builds the same, and fresh environments."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support import ROOT
from tests.support.installed import closure

PACKAGES = ("featstore", "align", "evaluate")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def build(kind: str, tree: Path, out: Path) -> Path:
    """A wheel or a source archive of a tree, by the backend that the project names."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, f"build_{kind}", out],
        cwd=tree,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [made] = out.iterdir()
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, since builders write beside it."""
    tree = tmp_path_factory.mktemp("tree") / "featstore"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    # What must not be taken along.
    (tree / "tests").mkdir()
    (tree / "tests" / "test_nothing.py").touch()
    return tree


@pytest.fixture(scope="module")
def archive(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the source archive."""
    place = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as opened:
        opened.extractall(place, filter="data")
    [tree] = place.iterdir()
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


def contents(wheel: Path) -> dict[str, int]:
    """Checksums of a wheel's files by name."""
    with ZipFile(wheel) as opened:
        return {entry.filename: entry.CRC for entry in opened.infolist()}


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(source: Path, wheel: Path) -> None:
    held = {name for name in contents(wheel) if not name.startswith("featstore-")}
    wanted = {
        str(path.relative_to(source)) for name in PACKAGES for path in (source / name).rglob("*") if path.is_file()
    }
    assert held == wanted
    assert {f"{name}/py.typed" for name in PACKAGES} < held


def test_the_source_archive_builds_the_wheel_of_the_tree(source: Path, wheel: Path, tmp_path: Path) -> None:
    record = "featstore-{}.dist-info/RECORD".format(wheel.name.split("-")[1])
    # RECORD lists the others' checksums, in an order of its own.
    of_tree, of_archive = (
        {name: crc for name, crc in contents(each).items() if name != record}
        for each in (build("wheel", source, tmp_path), wheel)
    )
    assert of_archive == of_tree


@pytest.fixture(scope="module")
def reachable(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skip where PyPI cannot be reached; from here on, whatever fails is ours."""
    asked = [
        "download",
        "-q",
        "--no-deps",
        "-c",
        ROOT / "constraints.txt",
        "-d",
        tmp_path_factory.mktemp("pip"),
        "rich",
    ]
    done = subprocess.run([sys.executable, "-m", "pip", *asked], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"PyPI cannot be reached: {done.stderr.strip().splitlines()[-1]}")


#: What is done in an environment that has the wheel and what it declares: functions of `tests/support/acts.py`.
FRESH = """
import json, runpy, sys
from importlib import metadata
import featstore
acts = runpy.run_path(sys.argv[1])
found = {name: acts[name](*sys.argv[2:4]) for name in sys.argv[4:]}
names = sorted(each.name for each in metadata.distributions())
print(json.dumps({"acts": found, "installed": names, "where": featstore.__file__}))
"""


@pytest.mark.registries
@pytest.mark.parametrize(("extra", "acts"), [("", ("reading", "looking_after")), ("page", ("drawing",))])
def test_the_wheel_works_in_a_fresh_environment(
    extra: str, acts: tuple[str, ...], wheel: Path, reachable: None, tiny_store: Path, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*words: object) -> str:
        done = subprocess.run(
            list(map(str, words)), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    fresh = tmp_path / "fresh"
    run(sys.executable, "-m", "venv", "--without-pip", fresh)
    pip = (sys.executable, "-m", "pip", "--python", fresh / "bin" / "python")
    wanted = f"featstore[{extra}] @ {wheel.as_uri()}" if extra else f"featstore @ {wheel.as_uri()}"
    run(*pip, "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", wanted)
    run(*pip, "check")
    words = (ROOT / "tests" / "support" / "acts.py", tiny_store, tmp_path, *acts)
    found = json.loads(run(fresh / "bin" / "python", "-c", FRESH, *words).splitlines()[-1])
    assert found["where"].startswith(str(fresh))
    assert found["acts"].keys() == set(acts)
    installed = {name.lower().replace("_", "-") for name in found["installed"]}
    assert installed <= closure(f"featstore[{extra}]" if extra else "featstore")
    assert run(fresh / "bin" / "align", "--version").startswith("align ")
