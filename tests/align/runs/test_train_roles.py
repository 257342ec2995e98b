"""Runs over the rows of some roles alone: what is fitted and scored, what is recorded, and what no sum can answer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.execution.threads import Threads
from align.maps.fitted import load_adapter
from align.runs.train import describe
from align.settings import Settings, load_settings
from align.similarity.compare import Comparison
from align.sweeps.compare import compare_runs
from align.sweeps.table import describe as describe_comparison
from featstore.errors import PairingError, SpecError, StoreStateError
from featstore.store.moments.writing import add_moments
from tests.support.commands import call, strict_json
from tests.support.planted import TEST, TRAIN, VAL, Planted, plant, rotation, spectrum_rows, trained
from tests.support.store_fixtures import rowless

KEY = "a:1->b:1"
USER, ASSISTANT = 2, 3
N, WIDTH = 2400, 12
#: One rotation for each role: a map of both is a map of neither.
TURNS = {USER: rotation(WIDTH, 11), ASSISTANT: rotation(WIDTH, 12)}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """The user and the assistant take turns of eight tokens; sinks are among the words of both."""
    role = np.where(np.arange(N) // 8 % 2, ASSISTANT, USER)
    x = spectrum_rows(N, WIDTH, 1, decay=0.3)
    x[3::240] *= 1000  # the user's
    x[11::240] *= 1000  # the assistant's
    y = np.empty_like(x)
    for number, turn in TURNS.items():
        y[role == number] = x[role == number] @ turn
    return plant(tmp_path_factory.mktemp("roles") / "s.zarr", x, y, role=role)


@pytest.fixture(scope="module")
def counts(planted: Planted) -> dict[str, int]:
    """Rows of the assistant that are no sinks, by split."""
    own = np.arange(N) // 8 % 2 == 1
    own[11::240] = False
    splits = {"train": TRAIN, "val": VAL, "test": TEST}
    return {name: int((own & (planted.split == split)).sum()) for name, split in splits.items()}


@pytest.fixture(scope="module")
def assistant(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "assistant"
    return out, trained(planted, out, "procrustes", roles="assistant")


@pytest.fixture(scope="module")
def executor() -> Iterator[Any]:
    with Threads(2) as threads:
        yield threads


def test_the_map_is_that_of_the_role(
    planted: Planted, assistant: tuple[Path, dict[str, Any]], counts: dict[str, int], tmp_path: Path
) -> None:
    entry = assistant[1]["pairs"][KEY]
    assert entry["test"]["r2"] == pytest.approx(1, abs=1e-5)
    assert {name: entry[name]["n"] for name in counts} == counts
    weight = load_adapter(assistant[0]).aligners[KEY].tensors["weight"]
    np.testing.assert_allclose(weight, TURNS[ASSISTANT], atol=1e-4)
    # Of all rows no rotation is; the controls are those of the selected rows, too.
    assert trained(planted, tmp_path / "all", "procrustes")["pairs"][KEY]["test"]["r2"] < 0.8
    assert entry["baselines"]["mean"]["n"] == counts["test"]
    with_sinks = np.arange(N) // 8 % 2 == 1
    assert entry["by_mask"]["masked"]["n"] == counts["test"]
    assert entry["by_mask"]["kept"]["n"] == (with_sinks & (planted.split == TEST)).sum() > counts["test"]


def test_a_run_says_which_roles_it_is_of(
    assistant: tuple[Path, dict[str, Any]], counts: dict[str, int], planted: Planted, tmp_path: Path
) -> None:
    out, result = assistant
    metrics, card = (strict_json((out / name).read_text()) for name in ("metrics.json", "adapter.json"))
    assert metrics["roles"] == card["roles"] == ["assistant"]
    assert metrics["pairs"][KEY]["by_role"] == {"assistant": counts}
    assert load_settings(out / "run.yaml").roles == "assistant"
    assert f"only rows of the roles assistant ({counts['train']} train, {counts['test']} test)" in describe(result)
    everything = trained(planted, tmp_path / "all", "affine")
    assert everything["roles"] is None
    assert strict_json((tmp_path / "all" / "adapter.json").read_text())["roles"] is None
    by_role = everything["pairs"][KEY]["by_role"]
    assert list(by_role) == ["user", "assistant"]
    assert by_role["assistant"] == counts
    assert sum(of["test"] for of in by_role.values()) == everything["pairs"][KEY]["test"]["n"]
    assert "only rows of" not in describe(everything)


def test_runs_of_other_roles_are_kept_apart(
    assistant: tuple[Path, dict[str, Any]], planted: Planted, tmp_path: Path
) -> None:
    trained(planted, tmp_path / "user", "procrustes", roles="user")
    trained(planted, tmp_path / "linear", "linear", roles="assistant")
    result = compare_runs([assistant[0], tmp_path / "user", tmp_path / "linear"])
    sets = {Path(row["run"]).name: row["set"] for row in result["rows"]}
    assert sets["assistant"] == sets["linear"] != sets["user"]
    assert "of the role user" in describe_comparison(result)


def test_trained_maps_see_the_same_rows(planted: Planted, counts: dict[str, int], tmp_path: Path) -> None:
    options = {"rank": 2, "epochs": 2, "tracker": "none", "skip": "procrustes"}
    entry = trained(planted, tmp_path / "lora", "lora", roles="assistant", **options)["pairs"][KEY]
    assert {name: entry[name]["n"] for name in counts} == counts
    assert entry["test"]["r2"] > 0.99


def test_a_compressed_map_answers_for_the_role_alone(planted: Planted, counts: dict[str, int], tmp_path: Path) -> None:
    options = {"latents": 4, "latent_dim": 8, "epochs": 1, "tracker": "none"}
    result = trained(planted, tmp_path / "compress", "compress", roles="assistant", **options)
    entry = result["pairs"][KEY]
    assert {name: entry[name]["n"] for name in counts} == counts
    assert entry["by_role"] == {"assistant": counts}
    # Of the source everything is read but its sinks, whoever's; of the target half of it is answered.
    assert entry["rate"]["source_tokens"] == 118
    assert 50 < entry["rate"]["target_tokens"] < 65


def test_stored_moments_answer_for_no_role(
    planted: Planted, assistant: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(shutil.copytree(planted.path, tmp_path / "s.zarr"))
    add_moments(store, quiet=True)
    options = ("--type", "procrustes", "--roles", "assistant", "--device", "cpu", "--out", tmp_path / "run")
    done = call(capsys, "align", "train", "--store", store, *options)
    assert done.code == 0, done.err
    said = "roles assistant: 1190 pairs, whose rows are read, since stored moments sum over all roles"
    assert said in " ".join(done.err.split())
    ours, theirs = (load_adapter(run).aligners[KEY].tensors for run in (tmp_path / "run", assistant[0]))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    rowless(store)
    bare = Planted(store, {}, {}, planted.split, planted.document)
    with pytest.raises(StoreStateError, match=r"--roles assistant needs rows, and .*only moments .*all roles"):
        trained(bare, tmp_path / "none", "affine", roles="assistant")
    assert not (tmp_path / "none").exists()
    cka = call(capsys, "align", "cka", "--store", store, "--roles", "assistant", "--out", tmp_path / "cka", "--json")
    assert cka.code != 0
    assert "--roles assistant needs rows" in cka.err


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ("narrator", "--roles 'narrator': choose among text, system, user, assistant, tool, generated, or all"),
        ("", "--roles '': choose among text"),
        ("assistant,", "--roles 'assistant,': choose among text"),
        ("system", "no pairs of a and b have the role system; they have user (1200), assistant (1200): choose --roles"),
    ],
)
@pytest.mark.parametrize("command", ["train", "cka"])
def test_wrong_roles_are_one_line_before_anything_is_written(
    planted: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, roles: str, words: str
) -> None:
    out = tmp_path / "out"
    done = call(capsys, "align", command, "--store", planted.path, "--roles", roles, "--out", out)
    assert done.code != 0
    assert words in " ".join(done.err.split())
    assert not (out / "run.yaml").exists()
    assert not (out / "cka.json").exists()


def test_settings_hold_roles_as_one_text(planted: Planted, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--roles 'everybody'"):
        trained(planted, tmp_path / "run", "affine", roles="everybody")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run.yaml").write_text("store: s.zarr\nroles: [assistant]\nloop: {}\n")
    with pytest.raises(SpecError, match=r"not a run.yaml"):
        load_settings(tmp_path / "run.yaml")
    # A run.yaml of a former version says nothing of roles.
    (tmp_path / "run.yaml").write_text("store: s.zarr\nloop: {}\n")
    assert load_settings(tmp_path / "run.yaml") == Settings("s.zarr", roles=None)


def test_similarity_of_a_role_is_that_of_a_store_with_nothing_else(
    planted: Planted, executor: Any, tmp_path: Path
) -> None:
    layers = {"a": (1,), "b": (1,)}
    options: dict[str, Any] = {"models": ("a", "b"), "layers": layers, "quiet": True}
    found = Comparison(planted.path, **options, roles="assistant").run(executor)
    own = np.arange(N) // 8 % 2 == 1
    alone = plant(tmp_path / "alone.zarr", planted.x[1][own], planted.y[1][own])
    expected = Comparison(alone.path, **options).run(executor)
    assert (found["roles"], expected["roles"]) == (["assistant"], None)
    assert (found["n"], found["masked_rows"]) == (expected["n"], expected["masked_rows"]) == (1190, 10)
    assert found["unmasked"]["n"] == 1200
    # The sums are about another origin, which moves the last digits.
    np.testing.assert_allclose(found["cross"], expected["cross"], atol=1e-5)
    np.testing.assert_allclose(found["unmasked"]["cross"], expected["unmasked"]["cross"], atol=1e-5)
    # A rotation of all of it; the user's states are turned another way.
    assert found["cross"][0][0] == pytest.approx(1, abs=1e-5)
    assert Comparison(planted.path, **options).run(executor)["cross"][0][0] < 0.9
    rbf = Comparison(planted.path, **options, roles=["assistant"], kernel="rbf", max_rows=5000).run(executor)
    assert rbf["n"] == 1190
    with pytest.raises(PairingError, match="have the role tool"):
        Comparison(planted.path, **options, roles="tool")


def test_the_commands_say_of_whom_their_figures_are(
    planted: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = call(capsys, "align", "cka", "--store", planted.path, "--roles", "assistant", "--out", tmp_path / "cka")
    assert "over 1190 pairs of the role assistant, 10 attention sinks apart" in text.out
    assert strict_json((tmp_path / "cka" / "cka.json").read_text())["roles"] == ["assistant"]
    grid = ("--types", "affine", "--workers", "1", "--out", tmp_path / "sweep")
    done = call(capsys, "align", "sweep", "--store", planted.path, *grid, "--roles", "user")
    assert done.code == 0, done.err
    assert strict_json((tmp_path / "sweep" / "affine" / "adapter.json").read_text())["roles"] == ["user"]
    other = call(capsys, "align", "sweep", "--store", planted.path, *grid, "--roles", "assistant")
    assert "holds a run of other settings" in " ".join(other.err.split())
