"""Documents beside stores that somebody else wrote: every reader takes them or refuses them in one line of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.strange_runs import TARGETS, build, trials
from tests.support.tiers import tiered

#: What resumes a training or a scan, or runs three commands, takes seconds for every document.
SLOW = {"adapter.json", "block-0000.npz", *(name for name in TARGETS if name.startswith("state"))}


@pytest.fixture(scope="module")
def base(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("strange")
    build(place, tiny_store)
    return place


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("seed", "number"), tiered([(0, 9)], [(1, 80)]))
def test_a_mutated_document_is_read_or_refused_in_one_line(base: Path, name: str, seed: int, number: int) -> None:
    count = trials(base, name, seed, -(-number // 9) if name in SLOW else number)
    assert count.wrong == []
    assert count.refused + count.accepted >= count.trials


def test_whole_documents_are_read_by_everybody(base: Path) -> None:
    for name, target in TARGETS.items():
        if name in SLOW:
            continue
        for reader in target.readers:
            reader(base)
