"""A trained resampler against planted answers: what it must find, what it must not, and that it says the same twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.compress import fit as compress_fit
from align.compress.fit import Compressed, fit_windows, steps_of
from align.compress.pack import pack
from align.compress.plan import WindowsPlan
from align.compress.report import NAMES, evaluate, table
from align.compress.resampler import Resampler, tensors_of
from align.compress.windows import Windows
from align.layers import LayerPair
from align.maps.registry import map_type
from align.metrics import DocumentSums
from align.runs.plan import windows_plan
from align.scoring.rows import Epoch
from align.settings import LoopSettings
from featstore.errors import FitError, StoreStateError
from tests.support.planted import TEST, TRAIN, VAL, Planted, plant, rotation
from tests.support.tiers import tiered

PAIR = LayerPair("a", (1,), "b", 1)
DOCUMENTS, TOKENS, WIDTH = 40, 50, 24


def sides(planted: Planted, **options: Any) -> tuple[Windows, Windows, Windows]:
    store = planted.store
    pairs = store.pairs("a", "b").select(keep_sinks=bool(options.get("keep_sinks")))
    train, val, test = (Windows(store, PAIR, pairs, split, **options) for split in (TRAIN, VAL, TEST))
    return train, val, test


def means(planted: Planted) -> tuple[Any, Any]:
    train = planted.split == TRAIN
    return planted.x[1][train].mean(0), planted.y[1][train].mean(0)


def plan(**options: Any) -> WindowsPlan:
    settings = LoopSettings(**{"latents": 10, "latent_dim": 10, "epochs": 3, **options})
    return windows_plan(map_type("compress"), settings)


def compressed(planted: Planted, **options: Any) -> Compressed:
    train, val, _ = sides(planted)
    own = {name: options.pop(name) for name in ("on_epoch", "tick", "checkpoint", "resume") if name in options}
    return fit_windows(train, val, means(planted), plan(**options), **own)


def r2s(planted: Planted, trained: Compressed) -> dict[str, Any]:
    return dict(evaluate(trained, *sides(planted))["rate_distortion"]["r2"])


def clustered(path: Path) -> Planted:
    """Every token is one of twelve, in twelve random places on either side: two coordinates tell which one it is."""
    rng = np.random.default_rng(1)
    n = DOCUMENTS * TOKENS
    which = rng.integers(12, size=n)
    x = rng.normal(size=(12, WIDTH))[which] + 0.05 * rng.normal(size=(n, WIDTH))
    y = rng.normal(size=(12, WIDTH))[which] + 0.1 * rng.normal(size=(n, WIDTH))
    return plant(path / "clusters.zarr", x, y, documents=DOCUMENTS)


def factors(path: Path) -> Planted:
    """Three numbers of a window are in all its states, under noise; all that the target has to do with the source."""
    rng = np.random.default_rng(2)
    n, document = DOCUMENTS * TOKENS, np.repeat(np.arange(DOCUMENTS), TOKENS)
    f = rng.normal(size=(DOCUMENTS, 3))[document]
    x = f @ rng.normal(size=(3, WIDTH)) + 2.0 * rng.normal(size=(n, WIDTH))
    y = f @ rng.normal(size=(3, WIDTH)) + 0.3 * rng.normal(size=(n, WIDTH))
    return plant(path / "factors.zarr", x, y, documents=DOCUMENTS)


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return clustered(tmp_path_factory.mktemp("compress"))


@pytest.fixture(scope="module")
def followed(clusters: Planted) -> tuple[Compressed, list[Epoch], list[float]]:
    """A training, its epochs and its ticks."""
    seen: list[Epoch] = []
    done: list[float] = []
    return compressed(clusters, on_epoch=seen.append, tick=done.append), seen, done


@pytest.fixture(scope="module")
def trained(followed: tuple[Compressed, list[Epoch], list[float]]) -> Compressed:
    return followed[0]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps an epoch, where it is not about what is learned."""
    monkeypatch.setattr(compress_fit, "EPOCH_STEPS", 8)


# What it must find, and what not.


def test_training_reads_from_few_coordinates_what_no_linear_map_can(clusters: Planted, trained: Compressed) -> None:
    found = r2s(clusters, trained)
    # A hundred numbers for fifty tokens: two coordinates each, of eleven that differ.
    assert found["pca"] < 0.4
    assert found["strided"] < 0.4
    assert found["compress"] > found["pca"] + 0.3
    assert trained.best_epoch > 0


def test_what_all_states_of_a_window_share_fits_into_one_latent(tmp_path: Path) -> None:
    planted = factors(tmp_path)
    found = r2s(planted, compressed(planted, latents=1, latent_dim=4))
    assert found["compress"] > 0.85
    assert found["compress"] > max(found["pca"], found["strided"]) + 0.1


@pytest.mark.parametrize("latents", tiered([10], [1, 50]))
def test_nothing_is_found_in_independent_data(tmp_path: Path, latents: int) -> None:
    rng = np.random.default_rng(3)
    x, y = (rng.normal(size=(DOCUMENTS * TOKENS, WIDTH)) for _ in range(2))
    planted = plant(tmp_path / "s.zarr", x, y, documents=DOCUMENTS)
    found = r2s(planted, compressed(planted, latents=latents))
    assert all(value <= 0.02 for value in found.values()), found


@pytest.mark.thorough
def test_more_latents_are_better(clusters: Planted, trained: Compressed) -> None:
    few = r2s(clusters, compressed(clusters, latents=2))["compress"]
    assert few < r2s(clusters, trained)["compress"] - 0.1


def test_with_room_for_everything_a_rotation_comes_out_whole(tmp_path: Path) -> None:
    x = np.random.default_rng(4).normal(size=(DOCUMENTS * TOKENS, 8))
    planted = plant(tmp_path / "s.zarr", x, x @ rotation(8, 2), documents=DOCUMENTS)
    # Eight numbers for each of fifty tokens: either all coordinates, or seven and where the token ends.
    found = r2s(planted, compressed(planted, latents=50, latent_dim=8, epochs=1))
    assert found["pca"] > 0.999
    assert found["compress"] > 0.99


# Epochs.


def test_epoch_zero_is_the_linear_codec_and_the_best_epoch_is_kept(
    clusters: Planted, followed: tuple[Compressed, list[Epoch], list[float]]
) -> None:
    result, seen, done = followed
    assert [epoch.epoch for epoch in seen] == [0, 1, 2, 3]
    assert seen[0].train_loss is None
    assert all(epoch.val_loss == 1 - float(epoch.val["r2"] or 0) for epoch in seen)
    losses = [epoch.val_loss for epoch in seen]
    assert result.best_epoch == int(np.argmin(losses)) == 3
    assert losses[0] > losses[3] + 0.3
    assert result.reason == "ran all 3 epochs"
    train, val, _ = sides(clusters)
    steps = steps_of(len(train), plan().batch_size)
    assert steps >= compress_fit.EPOCH_STEPS
    assert sum(done) == 3 * steps * plan().batch_size
    # What is returned is what was measured.
    figures = evaluate(result, train, val, val)["figures"]["compress"]
    assert figures["r2"] == pytest.approx(1 - min(losses), abs=1e-6)


@pytest.mark.usefixtures("quick")
def test_the_same_seed_gives_the_same_numbers(clusters: Planted) -> None:
    first = compressed(clusters, epochs=1).module.export()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again, other = compressed(clusters, epochs=1), compressed(clusters, epochs=1, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    second, third = (run.module.export() for run in (again, other))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert any(not np.array_equal(first[name], third[name]) for name in first if "send_more" in name)


@pytest.mark.usefixtures("quick")
def test_patience_stops_what_does_not_improve(clusters: Planted) -> None:
    result = compressed(clusters, min_delta=2.0, epochs=5)
    assert result.last_epoch == 2
    assert result.reason.startswith("stopped at epoch 2: no improvement of 2 in 2 epochs; best was epoch 2")


def test_a_loss_that_explodes_is_one_clear_error(clusters: Planted) -> None:
    with pytest.raises(FitError, match=r"a:1->b:1: the loss became (nan|inf) at epoch 1, step \d+; .* smaller --lr"):
        compressed(clusters, lr=1e30)


class _StopError(Exception):
    pass


@pytest.mark.usefixtures("quick")
def test_a_resumed_run_ends_with_the_same_numbers(clusters: Planted, tmp_path: Path) -> None:
    trained = compressed(clusters)

    def stop(epoch: Epoch) -> None:
        if epoch.epoch == 2:
            raise _StopError

    with pytest.raises(_StopError):
        compressed(clusters, checkpoint=tmp_path, on_epoch=stop)
    seen: list[int] = []
    resumed = compressed(clusters, checkpoint=tmp_path, resume=True, on_epoch=lambda e: seen.append(e.epoch))
    assert seen == [2, 3]
    assert resumed.reason == trained.reason
    first, second = trained.module.export(), resumed.module.export()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    # A finished run has nothing more to do.
    seen.clear()
    assert (
        compressed(clusters, checkpoint=tmp_path, resume=True, on_epoch=lambda e: seen.append(e.epoch)).best_epoch == 3
    )
    assert seen == []
    with pytest.raises(StoreStateError, match="another run: seed"):
        compressed(clusters, checkpoint=tmp_path, resume=True, seed=5)


@pytest.mark.usefixtures("quick")
def test_without_resume_a_run_begins_anew(clusters: Planted, tmp_path: Path) -> None:
    seen: list[int] = []
    for _ in range(2):
        compressed(clusters, checkpoint=tmp_path, epochs=1, on_epoch=lambda e: seen.append(e.epoch))
    assert seen == [0, 1, 0, 1]


# The module.


def test_a_window_comes_out_the_same_alone_and_in_a_batch(clusters: Planted, trained: Compressed) -> None:
    _, _, test = sides(clusters)
    module = trained.module
    first, second = list(test)[:2]
    for n in (3, 17, 50):
        short = (first.x[:n], first.ends_x[:n], first.ends_y[: n // 2])
        whole = (second.x, second.ends_x, second.ends_y)
        alone = module.reconstruct(*short)
        with torch.no_grad():
            both = module(tensors_of(pack(module.layout, [whole, short]), torch.device("cpu")))
        together = both[1, : n // 2].numpy() * module.unit + module.mean_target.numpy()
        assert alone.shape == (n // 2, WIDTH)
        assert np.abs(alone).max() > 0.1
        np.testing.assert_allclose(alone, together, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 4])
def test_padding_is_never_looked_at(clusters: Planted, trained: Compressed, stride: int) -> None:
    # Groups of several tokens and of one: what lies under the masks may be anything.
    module = Resampler(
        replace(trained.module.layout, stride=stride, latent_dim=10),
        basis=trained.module.basis.numpy(),
        mean_source=trained.module.mean_source.numpy(),
        mean_target=trained.module.mean_target.numpy(),
        readout=np.ones((trained.module.layout.most_coordinates, WIDTH), dtype=np.float32),
        unit=1.0,
    ).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    _, _, test = sides(clusters)
    first, second = list(test)[:2]
    packed = pack(module.layout, [(w.x[:n], w.ends_x[:n], w.ends_y) for w, n in ((first, 50), (second, 23))])
    with torch.no_grad():
        clean = module(tensors_of(packed, torch.device("cpu")))
        packed.x[~packed.tokens] = 7.0
        packed.ends_x[~packed.tokens] = 9.0
        packed.member[~packed.has] = 22
        packed.ends[~packed.groups] = 5.0
        packed.near[~packed.seen] = 0
        spoiled = module(tensors_of(packed, torch.device("cpu")))
    assert torch.equal(clean[1], spoiled[1])
    assert torch.equal(clean[0], spoiled[0])


def test_only_the_latents_reach_the_receiver(clusters: Planted, trained: Compressed) -> None:
    _, _, test = sides(clusters)
    module, window = trained.module, next(iter(test))
    batch = tensors_of(pack(module.layout, [(window.x, window.ends_x, window.ends_y)]), torch.device("cpu"))
    with torch.no_grad():
        sent = module.encode(batch)
        states = module.decode(sent, {k: v for k, v in batch.items() if k not in ("x", "ends_x", "tokens", "member")})
    np.testing.assert_array_equal(
        module.reconstruct(window.x, window.ends_x, window.ends_y),
        states[0].numpy() * module.unit + module.mean_target.numpy(),
    )
    # No more numbers than paid for, each in bfloat16, with a number for every end that is sent.
    used = int((batch["share"].sum(-1) + module.layout.positions)[batch["groups"]].sum())
    assert used <= module.layout.latents * module.layout.latent_dim
    assert int((sent != 0).sum()) <= used
    assert torch.equal(sent, sent.bfloat16().float())
    assert module.layout.stride == 1


def test_latents_depend_on_nothing_of_the_target(clusters: Planted, trained: Compressed) -> None:
    _, _, test = sides(clusters)
    module, window = trained.module, next(iter(test))
    sent = [
        module.encode(tensors_of(pack(module.layout, [(window.x, window.ends_x, ends)]), torch.device("cpu")))
        for ends in (window.ends_y, window.ends_y[:5] + 3)
    ]
    assert torch.equal(*sent)


def test_tensors_and_options_rebuild_the_module_to_the_bit(clusters: Planted, trained: Compressed) -> None:
    import json

    tensors, options = trained.module.export(), json.loads(json.dumps(trained.module.options))
    assert all(t.dtype == np.float32 and name.startswith("resampler.") for name, t in tensors.items())
    again = Resampler.from_tensors({**tensors, "control_mean": np.zeros(1, np.float32)}, options)
    for window in sides(clusters)[2]:
        given = (window.x, window.ends_x, window.ends_y)
        assert np.array_equal(trained.module.reconstruct(*given), again.reconstruct(*given))
    name = next(name for name in tensors if "read_more.weight" in name)
    for spoiled in ({k: v for k, v in tensors.items() if k != name}, {**tensors, name: tensors[name][:1]}):
        with pytest.raises(FitError, match="not the tensors and options of a compress map"):
            Resampler.from_tensors(spoiled, options)
    with pytest.raises(FitError, match="not the tensors and options of a compress map"):
        Resampler.from_tensors(tensors, {})


def test_reconstruct_refuses_what_does_not_fit(trained: Compressed) -> None:
    x, ends = np.zeros((4, WIDTH), np.float32), np.arange(1, 5)
    assert trained.module.reconstruct(x, ends, ends[:0]).shape == (0, WIDTH)
    with pytest.raises(FitError, match="without source tokens"):
        trained.module.reconstruct(x[:0], ends[:0], ends)
    for wrong in ((x[:, :3], ends, ends), (x, ends[:3], ends), (x, ends, ends[:, None])):
        with pytest.raises(FitError, match="do not fit"):
            trained.module.reconstruct(*wrong)


# What cannot be meant.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"latents": 0}, "latents 0: must be at least 1"),
        ({"latent_dim": 0}, "latent_dim 0: must be at least 1"),
        ({"latent_dim": WIDTH + 1}, f"latent_dim {WIDTH + 1} is above the source's width {WIDTH}"),
    ],
)
def test_sizes_that_cannot_be_meant(clusters: Planted, options: dict[str, int], words: str) -> None:
    with pytest.raises(FitError, match=words):
        compressed(clusters, **options)


def test_one_number_in_all_still_works(clusters: Planted) -> None:
    result = compressed(clusters, latents=1, latent_dim=1, epochs=1)
    assert not result.module.layout.positions
    assert np.isfinite(r2s(clusters, result)["compress"])


# The report.


def test_a_report_says_what_it_costs(clusters: Planted, trained: Compressed) -> None:
    documents = DocumentSums()
    found = evaluate(trained, *sides(clusters), documents=documents)
    assert set(found["figures"]) == set(found["reasons"]) == set(NAMES)
    for name in NAMES:
        figures = found["figures"][name]
        assert figures["n"] == sum(documents.n)
        assert figures["r2"] == pytest.approx(1 - documents.sse[name].sum() / documents.sst.sum())
    # Every target token has a partner here.
    assert found["figures"]["compress"]["all_positions"] == pytest.approx(found["figures"]["compress"]["r2"])
    assert found["figures"]["pca"]["all_positions"] is None
    assert found["reasons"]["pca"]["all_positions"] == "answers at paired positions alone"
    point = found["rate_distortion"]
    assert (point["latents"], point["latent_dim"], point["bytes_per_window"]) == (10, 10, 200)
    assert (point["text_bytes"], point["token_id_bytes"], point["raw_bytes"]) == (TOKENS, TOKENS, TOKENS * WIDTH * 2)
    assert point["side_bytes"] == TOKENS + 4
    assert point["bytes_per_text_byte"] == 4.0
    cheaper = {**point, "latents": 5, "bytes_per_window": 100, "r2": {"compress": None, "pca": 0.5}}
    head, first, second, *rest = table([point, cheaper]).splitlines()
    assert [*head.split()[5:8]] == ["compress", "pca", "strided"]
    assert first.split() == ["5x10", "100", "4.00", "-", "0.500", "-"]
    assert second.split()[:3] == ["10x10", "200", "4.00"]
    assert len(rest) == 1
