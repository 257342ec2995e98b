"""What `info` says of the states, against what is planted."""

from __future__ import annotations

import numpy as np
import pytest

from featstore import open_store
from featstore.store.conversion.convert import convert
from featstore.store.inspect.summary import describe_states, ranks_of, states_summary
from tests.support.commands import call
from tests.support.store_fixtures import Recipe, states, write_quickly

RECIPE = Recipe(form="float32", layout="hot", shard_rows=1024, documents=60, layers=(0, 3))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_quickly(tmp_path_factory.mktemp("summary") / "s.zarr", RECIPE)


class TestRanks:
    @pytest.mark.parametrize("rows", [40, 400])
    @pytest.mark.parametrize("directions", [1, 3, 20])
    def test_equal_directions_are_counted(self, rows, directions):
        """Either Gram matrix; the mean is no direction."""
        rng = np.random.default_rng(0)
        left, _ = np.linalg.qr(rng.standard_normal((rows, directions + 1)) - 0.0)
        left = left - left.mean(axis=0)
        left, _ = np.linalg.qr(left)
        right, _ = np.linalg.qr(rng.standard_normal((64, directions)))
        planted = (left[:, :directions] @ right.T * 7 + 100).astype(np.float32)
        effective, participation = ranks_of(planted)
        assert effective == pytest.approx(directions, rel=1e-2)
        assert participation == pytest.approx(directions, rel=1e-3)

    def test_a_spectrum_whose_ranks_are_known(self):
        rng = np.random.default_rng(1)
        variance = np.array([4.0, 2.0, 1.0, 1.0])
        rows = (rng.standard_normal((200_000, 4)) * np.sqrt(variance)).astype(np.float32)
        share = variance / variance.sum()
        effective, participation = ranks_of(rows)
        assert effective == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=0.01)
        assert participation == pytest.approx(8**2 / 22, rel=0.01)

    def test_nothing_varies(self):
        assert ranks_of(np.full((5, 3), 2, np.float32)) == (0.0, 0.0)


class TestStates:
    def test_energy_is_that_of_the_rows(self, path):
        store, found = open_store(path), states_summary(open_store(path), quiet=True)
        for name in store.models:
            rows, sink = store.model(name).rows, store.tokens(name).sink
            for layer in RECIPE.layers:
                energy = (states(RECIPE, name, layer, rows).astype(np.float64) ** 2).sum(axis=1)
                of = found[name][str(layer)]
                loudest = np.sort(energy)[::-1][: int(np.ceil(rows / 1000))]
                assert len(loudest) > 1
                assert of["energy_top"] == pytest.approx(loudest.sum() / energy.sum(), rel=1e-5)
                assert of["energy_sinks"] == pytest.approx(energy[sink].sum() / energy.sum(), rel=1e-5)
                assert of["energy_sinks"] > 0.9 > 0.3 > of["energy_top"]

    def test_ranks_leave_sinks_and_special_tokens_out(self, path):
        store, found = open_store(path), states_summary(open_store(path), quiet=True)
        for name in store.models:
            table = store.tokens(name)
            ordinary = np.flatnonzero(~table.sink & ~table.special)
            assert found[name]["3"]["rank_rows"] == min(len(ordinary), 2048)
            assert found[name]["3"]["effective_rank"] == pytest.approx(8, abs=0.1)  # white noise of width 8
            whole = store.rows(name, 3)[ordinary]
            assert found[name]["3"]["participation_ratio"] == pytest.approx(ranks_of(whole)[1], rel=0.02)

    def test_bytes_are_those_on_disk(self, path, tmp_path):
        convert(path, tmp_path / "c.zarr", form="int8", layout="archive", quiet=True)
        for place in (path, tmp_path / "c.zarr"):
            store, found = open_store(place), states_summary(open_store(place), spectrum=False, quiet=True)
            kinds = ("resid", "norm", "row_scale", "column_scale")
            for name in store.models:
                for layer in RECIPE.layers:
                    files = [f for kind in kinds for f in (place / "models" / name / kind / str(layer)).glob("c/**/*")]
                    total = sum(f.stat().st_size for f in files if f.is_file())
                    of = found[name][str(layer)]
                    assert of["bytes"] == total
                    assert of["ratio"] == pytest.approx(2 * 8 * store.model(name).rows / total)
                    assert of["effective_rank"] is None
                    assert of["rank_rows"] == 0

    def test_for_people(self, path):
        store = open_store(path)
        text = describe_states(states_summary(store, quiet=True))
        assert text.count("\n") == 1 + 2 * len(RECIPE.layers)
        assert len({len(line) for line in text.splitlines()[1:-1]}) == 1
        without = describe_states(states_summary(store, spectrum=False, quiet=True))
        assert "ranks:" not in without
        assert [len(line) for line in without.splitlines()] == [len(line) for line in text.splitlines()[:-1]]


def test_the_command(path, capsys):
    told = call(capsys, "featstore", "info", path, "--json").json
    assert told["states"]["a"]["3"]["effective_rank"] > 7
    assert told["models"]["a"]["layers"] == [0, 3]
    assert call(capsys, "featstore", "info", path, "--no-spectrum", "--json").json["states"]["a"]["3"]["rank_rows"] == 0
    assert "effective rank" in call(capsys, "featstore", "info", path).out
