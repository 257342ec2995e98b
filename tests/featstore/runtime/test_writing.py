"""Files that are made aside, with the umask's rights, and never through a link."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from featstore.errors import LinkError, NoSpaceError, WriteError
from featstore.runtime import writing
from featstore.runtime.provenance import write_atomic, write_json


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def by_name(path: Path) -> None:
    """As a library does that writes to a name, and lets nobody but the owner read."""
    with writing.replacing_by_name(path) as aside:
        aside.unlink()
        os.close(os.open(aside, os.O_WRONLY | os.O_CREAT, 0o600))


def held(path: Path) -> None:
    with writing.locked(path):
        pass


def settled(path: Path) -> None:
    path.parent.joinpath("new").mkdir()
    made = path.parent / "new" / path.name
    os.close(os.open(made, os.O_WRONLY | os.O_CREAT, 0o600))
    writing.settle(made.parent)
    made.rename(path)


#: Every way in which a file comes into being.
WAYS = {
    "text": lambda path: write_atomic(path, "text"),
    "json": lambda path: write_json(path, {"a": 1}),
    "by name": by_name,
    "appended": lambda path: writing.append_text(path, "line\n"),
    "lock": held,
    "settled": settled,
}


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o022, 0o002, 0o000])
@pytest.mark.parametrize("way", WAYS)
def test_a_file_has_the_rights_that_the_umask_leaves(tmp_path, way, mask):
    with umask(mask):
        WAYS[way](tmp_path / "file")
    assert rights(tmp_path / "file") == 0o666 & ~mask


def test_a_file_that_is_replaced_gets_the_rights_of_a_new_one(tmp_path):
    with umask(0o022):
        write_atomic(tmp_path / "file", "open")
    with umask(0o077):
        write_atomic(tmp_path / "file", "closed")
    assert rights(tmp_path / "file") == 0o600


@pytest.mark.parametrize("way", ["text", "json", "by name", "settled"])
def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path, way):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "file").symlink_to(tmp_path / "victim")
    WAYS[way](tmp_path / "file")
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("way", ["appended", "lock"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_that_would_be_followed_is_refused(tmp_path, way, there):
    victim = tmp_path / "victim"
    if there:
        victim.write_text("precious")
    (tmp_path / "file").symlink_to(victim)
    with pytest.raises(WriteError, match="file"):
        WAYS[way](tmp_path / "file")
    assert victim.exists() == there
    assert not there or victim.read_text() == "precious"


class TestAside:
    def test_names_cannot_be_foreseen(self, tmp_path):
        names = {writing.aside_of(tmp_path / "file").name for _ in range(100)}
        assert len(names) == 100
        assert all(name.startswith(".file.") and name.endswith(".part") for name in names)

    def test_a_name_that_is_taken_is_not_written_to(self, tmp_path, monkeypatch):
        (tmp_path / "victim").write_text("precious")
        (tmp_path / ".taken.part").symlink_to(tmp_path / "victim")
        monkeypatch.setattr(writing, "aside_of", lambda path: path.with_name(".taken.part"))
        for way in ("text", "by name"):
            with pytest.raises(WriteError, match="File exists"):
                WAYS[way](tmp_path / "file")
            assert (tmp_path / "victim").read_text() == "precious"
            (tmp_path / ".taken.part").unlink(missing_ok=True)
            (tmp_path / ".taken.part").symlink_to(tmp_path / "victim")

    @pytest.mark.parametrize("name", ["x" * 255, "ü" * 127])
    def test_the_longest_names_can_be_written(self, tmp_path, name):
        write_atomic(tmp_path / name, "text")
        assert [path.name for path in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize("way", ["text", "by name"])
    def test_nothing_is_left_where_the_disk_is_full(self, tmp_path, monkeypatch, way):
        (tmp_path / "file").write_text("before")

        def full(_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(NoSpaceError, match=r"cannot write .*/file \(No space left on device\); .* free some space"):
            WAYS[way](tmp_path / "file")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        assert (tmp_path / "file").read_text() == "before"

    def test_what_killed_writers_left_goes_and_nothing_behind_links(self, tmp_path):
        root, other = tmp_path / "root", tmp_path / "other"
        (root / "a").mkdir(parents=True)
        other.mkdir()
        for path in (root / ".x.part", root / "a" / ".y.0123.part", root / "a" / "kept.part", other / ".z.part"):
            path.write_text("half")
        (root / ".folder.part").mkdir()
        (root / "away").symlink_to(other)
        (root / ".link.part").symlink_to(other / ".z.part")
        writing.remove_asides(root)
        assert sorted(p.name for p in root.rglob("*")) == [".folder.part", "a", "away", "kept.part"]
        assert (other / ".z.part").exists()


@pytest.mark.parametrize(
    ("number", "kind", "remedy"),
    [
        (errno.EACCES, WriteError, "have the rights changed"),
        (errno.EROFS, WriteError, "have the rights changed"),
        (errno.ENAMETOOLONG, WriteError, "another name"),
        (errno.EDQUOT, NoSpaceError, "free some space"),
        (errno.EFBIG, NoSpaceError, "ulimit -f"),
        (errno.EIO, WriteError, "another place"),
    ],
)
def test_what_the_system_refuses_is_named_with_the_remedy(tmp_path, monkeypatch, number, kind, remedy):
    def refuse(*_args, **_more):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(kind, match=rf"cannot write .*/file \({os.strerror(number)}\); .*{remedy}"):
        write_atomic(tmp_path / "file", "text")


class TestLock:
    def test_a_second_one_waits_or_is_told(self, tmp_path):
        with (
            writing.locked(tmp_path / "lock"),
            pytest.raises(BlockingIOError),
            writing.locked(tmp_path / "lock", wait=False),
        ):
            pass
        with writing.locked(tmp_path / "lock", wait=False):
            pass

    def test_what_is_in_the_file_stays(self, tmp_path):
        (tmp_path / "lock").write_text("note")
        held(tmp_path / "lock")
        assert (tmp_path / "lock").read_text() == "note"

    def test_a_link_is_named_with_where_it_leads(self, tmp_path):
        (tmp_path / "lock").symlink_to("/elsewhere")
        with pytest.raises(
            LinkError, match=r"lock is a link to /elsewhere, and a lock is not taken through one; remove"
        ):
            held(tmp_path / "lock")

    def test_a_pipe_neither_blocks_nor_is_a_lock(self, tmp_path):
        os.mkfifo(tmp_path / "lock")
        with pytest.raises(WriteError, match="no ordinary file"):
            held(tmp_path / "lock")


class TestFolders:
    def test_links_below_the_root_are_refused_and_the_root_may_be_one(self, tmp_path):
        real, other = tmp_path / "real", tmp_path / "other"
        real.mkdir()
        other.mkdir()
        root = tmp_path / "root"
        root.symlink_to(real)
        assert writing.check_folder(root, "a", "b/c").is_dir()
        (real / "a" / "away").symlink_to(other)
        for names in (("a", "away"), ("a/away/below",)):
            with pytest.raises(LinkError, match=rf"away is a link to {other}, and nothing is written through links"):
                writing.check_folder(root, *names)
        assert list(other.iterdir()) == []

    def test_a_folder_goes_with_its_links_and_what_they_lead_to_stays(self, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "kept").touch()
        (tmp_path / "root" / "gone").mkdir(parents=True)
        (tmp_path / "root" / "gone" / "away").symlink_to(tmp_path / "other")
        writing.remove_folder(tmp_path / "root", "gone")
        writing.remove_folder(tmp_path / "root", "gone")
        assert list((tmp_path / "root").iterdir()) == []
        (tmp_path / "root" / "gone").symlink_to(tmp_path / "other")
        with pytest.raises(LinkError):
            writing.remove_folder(tmp_path / "root", "gone")
        assert (tmp_path / "other" / "kept").exists()
