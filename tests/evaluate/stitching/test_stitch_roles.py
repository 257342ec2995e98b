"""Stitched loss of some roles: which predictions are scored, that states are put in all the same, what is recorded."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import evaluate
from align.maps.fitted import load_adapter
from align.runs.train import train
from align.settings import LoopSettings, Settings
from evaluate.results import read_stitch
from evaluate.stitching.scores import FIRST_SCORED
from evaluate.stitching.stitch import describe, stitch
from evaluate.stitching.windows import scored_windows
from featstore.errors import PairingError, SpecError
from featstore.runtime.console import jsonable
from featstore.store import Tokens, open_store
from tests.support.commands import call
from tests.support.store_fixtures import give_roles

KEY = "llama:2->mistral:2"
USER, ASSISTANT = 2, 3
#: Bytes of every window that the user wrote; the assistant wrote the rest.
ASKED = 200


def role_of(tokens: Tokens) -> np.ndarray:
    """Both models read the same bytes, so their tokens there have the same role."""
    return np.where(tokens.byte_end <= ASKED, USER, ASSISTANT)


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    base = tmp_path_factory.mktemp("roles")
    path = give_roles(Path(shutil.copytree(tiny_store, base / "s.zarr")), role_of)
    train(Settings(str(path), "affine", layers="2", roles="assistant"), base / "run", quiet=True)
    train(Settings(str(path), "affine", layers="2"), base / "all", quiet=True)
    own, everything = (load_adapter(base / name) for name in ("run", "all"))
    return SimpleNamespace(path=path, store=open_store(path), directory=base / "run", adapter=own, all=everything)


@pytest.fixture(scope="module")
def losses(run: SimpleNamespace) -> dict[str, dict[str, Any]]:
    """The same windows and the same map, scored for one role, for the other, and for both."""
    return {
        roles: stitch(run.store, run.adapter, roles=roles, max_tokens=700, quiet=True)
        for roles in ("user", "assistant", "all")
    }


def test_losses_of_the_roles_add_up_to_that_of_all(run: SimpleNamespace, losses: dict[str, dict[str, Any]]) -> None:
    windows = [
        [w.number for w in scored_windows(run.store, "llama", "mistral", max_tokens=700, roles=roles)]
        for roles in losses
    ]
    assert windows[0] == windows[1] == windows[2]
    parts = {roles: result["pairs"][KEY] for roles, result in losses.items()}
    tokens = {roles: part["n_tokens"] for roles, part in parts.items()}
    assert min(tokens.values()) > 30
    assert tokens["user"] + tokens["assistant"] == tokens["all"]
    for condition in ("clean", "mapped", "mean"):
        for figure in ("nats_per_token", "kl"):
            sums = {roles: part["conditions"][condition][figure] * tokens[roles] for roles, part in parts.items()}
            assert sums["user"] + sums["assistant"] == pytest.approx(sums["all"], rel=1e-6, abs=1e-6)
    # States are put in at the same places, whatever is scored.
    assert len({part["replaced_share"] for part in parts.values()}) == 1
    assert all(part["self_bit_identical"] for part in parts.values())


def test_a_token_is_scored_for_who_wrote_it(run: SimpleNamespace) -> None:
    for roles, first, last in (("user", 1, ASKED), ("assistant", ASKED + 1, 10**6)):
        for window in scored_windows(run.store, "llama", "mistral", roles=roles):
            for side, counts in ((window.source, window.source_counts), (window.target, window.target_counts)):
                ends = side.byte_end[~side.special]
                np.testing.assert_array_equal(counts[~side.special], (ends >= first) & (ends <= last))


def test_states_are_put_in_where_the_user_wrote_too(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate.stitching.conditions as module

    seen: list[torch.Tensor] = []
    original = module.inject

    def spy(stream: Any, injection: Any, *, whole: bool) -> Any:
        seen.append(injection.hidden.clone())
        return original(stream, injection, whole=whole)

    monkeypatch.setattr(module, "inject", spy)
    [window] = scored_windows(run.store, "llama", "mistral", max_tokens=1, roles="assistant")
    stitch(run.store, run.adapter, max_tokens=1, quiet=True)
    own, *others = seen
    changed = np.logical_or.reduce([(row != own[0]).any(dim=-1).numpy() for hidden in others for row in hidden])
    assert np.flatnonzero(changed).tolist() == window.places.tolist()
    assert (window.target.byte_end[window.places] <= ASKED).any()


def test_without_roles_a_run_is_scored_as_it_was_fitted(
    run: SimpleNamespace, losses: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    own = stitch(run.store, run.adapter, max_tokens=700, quiet=True)
    assert jsonable(own) == jsonable(losses["assistant"])
    assert own["roles"] == ["assistant"]
    assert losses["all"]["roles"] is None
    assert stitch(run.store, run.all, max_tokens=1, quiet=True)["roles"] is None
    assert f"{KEY}: {own['pairs'][KEY]['n_tokens']} tokens of the role assistant of " in describe(own)
    options = ("--adapter", run.directory, "--max-tokens", "100", "--roles", "user", "--device", "cpu")
    done = call(capsys, "evaluate", "stitch", "--store", run.path, *options)
    assert done.code == 0, done.err
    assert "tokens of the role user of" in done.out
    assert read_stitch(run.directory).roles == ("user",)
    result = evaluate.stitch(run.store, run.directory, roles=["user"], max_tokens=100, device="cpu", quiet=True)
    assert result.roles == ("user",)
    assert "tokens of the role user of" in result._repr_html_()


def test_the_source_alone_is_scored_for_the_role(run: SimpleNamespace) -> None:
    result = stitch(run.store, run.adapter, max_tokens=400, source_alone=True, quiet=True)
    windows = scored_windows(run.store, "llama", "mistral", max_tokens=400, roles="assistant")
    alone = result["pairs"][KEY]["alone"]["source"]
    own = [w.source_counts & ~w.source.special for w in windows]
    assert alone["n_tokens"] == sum(int(counts[FIRST_SCORED:].sum()) for counts in own) > 0
    # The assistant's bytes follow the user's last token.
    ends = [w.source.byte_end for w in windows]
    asked = [int(end[end <= ASKED].max()) for end in ends]
    assert alone["n_bytes"] == sum(int(end.max()) - before for end, before in zip(ends, asked, strict=True))


def test_every_epoch_is_scored_for_the_role(
    run: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evaluate.stitching.epochs as module

    seen: list[Any] = []

    def told(*args: Any, **options: Any) -> dict[str, Any]:
        result = stitch(*args, **options)
        seen.append(result["roles"])
        return result

    monkeypatch.setattr(module, "stitch", told)
    loop = LoopSettings(rank=2, epochs=1, skip="none", tracker="none")
    settings = Settings(str(run.path), "lora", layers="2", roles="assistant", eval_models=True, loop=loop)
    train(settings, tmp_path / "run", quiet=True)
    assert seen == [["assistant"]] * 2


def test_roles_that_nobody_has_are_refused_before_a_model_is_loaded(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("evaluate.stitching.stitch.Models", never)
    words = (
        r"the test split of .* has no token to score of the role tool; the roles of 'mistral' there are "
        r"user \(\d+\), assistant \(\d+\): choose --roles among these, or all"
    )
    with pytest.raises(PairingError, match=words):
        stitch(run.store, run.adapter, roles="tool", quiet=True)
    for wrong in ("narrator", "", []):
        with pytest.raises(SpecError, match=r"--roles .*choose among text"):
            stitch(run.store, run.adapter, roles=wrong, quiet=True)
    options = ("--adapter", run.directory, "--roles", "narrator")
    done = call(capsys, "evaluate", "stitch", "--store", run.path, *options)
    assert done.code != 0
    assert "--roles 'narrator': choose among text" in done.err
