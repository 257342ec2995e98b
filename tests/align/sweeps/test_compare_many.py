"""The leaderboard of very many layer pairs: work in proportion to them, and a table that people can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import align.sweeps.compare as module
from align.sweeps.compare import compare_runs
from align.sweeps.table import describe
from tests.support.many_pairs import write_run


class Counted(dict[str, Any]):
    """A row of the table that counts how often it is looked at."""

    looks = 0

    def __getitem__(self, name: str) -> Any:
        Counted.looks += 1
        return super().__getitem__(name)

    def __eq__(self, other: object) -> bool:
        Counted.looks += 1
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("reference", [None, "closed_form", "a"])
def test_work_grows_as_the_layer_pairs_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str | None
) -> None:
    read = module.read_entries

    def counted(directory: Path) -> Any:
        entries = read(directory)
        for entry in entries:
            entry.row = Counted(entry.row)
        return entries

    monkeypatch.setattr(module, "read_entries", counted)
    looks = {}
    for pairs in (60, 240):
        runs = [write_run(tmp_path / str(pairs) / name, pairs, documents=4, seed=s) for s, name in enumerate("ab")]
        Counted.looks = 0
        found = compare_runs(runs, str(runs[0]) if reference == "a" else reference)
        assert describe(found, most=10_000).count(" test rows") == pairs
        looks[pairs] = Counted.looks
    assert len(found["rows"]) == 480
    assert looks[240] < 4.5 * looks[60]


def test_a_long_table_shows_its_ends_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 150, documents=4, seed=seed) for seed, name in enumerate("ab")]
    found = compare_runs(runs)
    text = describe(found)
    best = {row["pair"]: row["val_r2"] for row in reversed(found["rows"])}
    ranked = sorted(best, key=lambda pair: -best[pair])
    # Two rows of each layer pair: 75 of the best, and 25 of the worst.
    shown = [line.partition(",")[0] for line in text.splitlines() if line.endswith(" 1500 test rows")]
    assert set(shown) == {*ranked[:75], *ranked[-25:]}
    assert shown == [pair for pair in dict.fromkeys(row["pair"] for row in found["rows"]) if pair in set(shown)]
    assert "50 more layer pairs (100 rows) are not shown" in text
    assert "--json has all of them" in text
    whole = describe(found, most=300)
    assert "more layer pairs" not in whole
    assert sum(line.endswith(" 1500 test rows") for line in whole.splitlines()) == 150
    assert len(found["rows"]) == 300


def test_a_block_larger_than_the_table_is_shown_whole(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"r{seed}", 3, documents=4, seed=seed) for seed in range(4)]
    text = describe(compare_runs(runs), most=4)
    # The best block and the worst; never a part of one.
    assert sum(line.endswith(" 1500 test rows") for line in text.splitlines()) == 2
    assert "1 more layer pair (4 rows) is not shown" in text
