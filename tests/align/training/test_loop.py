"""The gradient loop: what a step is, what is told, when it ends, and how far the defaults get."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import align.training.loop
import align.training.losses
import align.training.tracking
from align.maps.registry import map_type
from align.metrics import debiased_cka
from align.runs.plan import training_plan, windows_plan
from align.scoring.rows import Epoch
from align.settings import LoopSettings
from align.training.building import build_module
from align.training.checkpoint import FILE
from align.training.engine import Engine, Objective, accelerator_for, one_cycle, precision_of
from align.training.modules import LinearMap
from align.training.plan import Placement, Shape, parse_loss
from align.training.probe import CkaProbe
from align.training.tracking import Tracker, check_tracker, tracking
from featstore.errors import FitError, MissingPackageError, SpecError
from tests.support.looping import PAIR, Ready, command, launched, ready, result, run
from tests.support.tiers import tiered


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    return ready(tmp_path_factory.mktemp("loop") / "s.zarr")


# What a step is.


@pytest.mark.parametrize("steps", [1, 3, 8, 20, 99, 100, 101, 1000])
def test_the_schedule_is_torch_s_one_cycle(steps: int) -> None:
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=0.3, total_steps=steps + 1, pct_start=min(0.1, 10 / steps), anneal_strategy="cos"
    )
    for step in range(steps):
        lr, beta = one_cycle(step, steps, 0.3)
        assert lr == pytest.approx(schedule.get_last_lr()[0], rel=1e-9, abs=1e-12)
        assert beta == pytest.approx(optimiser.param_groups[0]["betas"][0], rel=1e-9)
        optimiser.step()
        schedule.step()
    assert one_cycle(steps, steps, 0.3)[0] == pytest.approx(0.3 / 25e4)


def test_the_schedule_has_a_value_for_every_length() -> None:
    for steps in range(1, 40):
        rates = [one_cycle(step, steps, 1.0)[0] for step in range(steps + 1)]
        assert all(0 < rate <= 1 for rate in rates), steps


def engine_of(width: int = 6, **options: Any) -> Engine:
    accelerator = accelerator_for(Placement(precision=options.pop("precision", "float32")))
    objective = Objective(parse_loss("mse=1"), torch.zeros(width), 1.0, 0.07)
    settings = {"lr": 0.1, "clip": math.inf, "steps": 10, "averaging": 8, **options}
    return Engine(accelerator, LinearMap(width, width), objective, **settings)


def rows(n: int, seed: int, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator)
    return x, x @ torch.randn(width, width, generator=torch.Generator().manual_seed(99))


def test_micro_batches_count_by_their_rows() -> None:
    parts = [rows(5, 1), rows(8, 2), rows(2, 3)]
    whole = tuple(torch.cat(side) for side in zip(*parts, strict=True))
    cut, one = engine_of(), engine_of()
    for _ in range(3):
        cut.step(iter(parts), 3, 15)
        one.step(iter([whole]), 1, 15)
    for name, value in one.state().items():
        np.testing.assert_allclose(cut.state()[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(cut.read(), one.read(), rtol=1e-5)


def test_a_step_is_adamw_s_and_the_average_follows() -> None:
    engine = engine_of(clip=0.5)
    weight = torch.nn.Parameter(torch.zeros(6, 6))
    optimiser = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    mean, norms = torch.zeros(6, 6), []
    for step in range(4):
        x, y = rows(9, step)
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(x @ weight, y).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([weight], 0.5)))
        lr, beta = one_cycle(step, 10, 0.1)
        optimiser.param_groups[0] |= {"lr": lr, "betas": (beta, 0.99)}
        optimiser.step()
        mean.lerp_(weight.detach(), 9 / (8 + step + 1))
        engine.step(iter([(x, y)]), 1, 9)
    state = engine.state()
    np.testing.assert_allclose(state["weight.W"], weight.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(state["average.W"], mean.numpy(), atol=1e-6)
    # What is told is the norm before clipping.
    assert min(norms) > 0.5
    np.testing.assert_allclose([figures[-1] for figures in engine.read()], norms, rtol=1e-5)
    assert engine.read() == []


def test_one_process_or_two_take_the_same_steps(data: Ready, tmp_path: Path) -> None:
    # 1600 pairs in batches of 64 are 25, so the last step has a single one and the other process none.
    options = {"batch_size": 64, "epochs": 2, "hidden": 32, "cka_every": 3, "loss": "mse=1,infonce=0.1"}
    launched(command(data, tmp_path / "two", "mlp", accumulate=2, checkpoint=str(tmp_path / "state"), **options), 2)
    alone = run(data, "mlp", accumulate=4, **options)
    (tensors, told), (other, silent) = (result(tmp_path / "two", rank) for rank in (0, 1))
    assert silent == [], "only the main process tells"
    assert not (tmp_path / "two" / "1.log").exists()
    assert [path.name for path in (tmp_path / "state").iterdir()] == [FILE]
    assert len(told) == len(alone.told) == 3 + 4
    for name, tensor in alone.trained.aligner.tensors.items():
        np.testing.assert_array_equal(tensors[name], other[name], err_msg=name)
        np.testing.assert_allclose(tensors[name], tensor, rtol=1e-3, atol=1e-4 * np.abs(tensor).max(), err_msg=name)
    for mine, theirs in zip(alone.told, told, strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("train_loss", "val_loss", "lr", "loss", "cka", "grad_norm", "recent_loss"):
            if mine.get(name) is not None:
                assert theirs[name] == pytest.approx(mine[name], rel=1e-3), name
        assert theirs.get("parts", {}) == pytest.approx(mine.get("parts", {}), rel=1e-3)


@pytest.mark.thorough
def test_two_processes_take_the_same_steps_again(data: Ready, tmp_path: Path) -> None:
    options = {"batch_size": 64, "epochs": 2, "hidden": 32, "cka_every": 3, "loss": "mse=1,infonce=0.1"}
    for name in ("once", "again"):
        launched(command(data, tmp_path / name, "mlp", accumulate=2, **options), 2)
    assert result(tmp_path / "again")[1] == result(tmp_path / "once")[1]


# Precision.


def test_precision_follows_the_device() -> None:
    assert precision_of(Placement()) == "float32"
    assert precision_of(Placement(precision="bfloat16")) == "bfloat16"
    with pytest.raises(SpecError, match="'half': choose one of auto"):
        precision_of(Placement(precision="half"))


def test_bfloat16_keeps_float32_weights_and_losses() -> None:
    engine = engine_of(precision="bfloat16")
    seen = []
    engine.module.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    x, y = rows(32, 0)
    engine.step(iter([(x, y)]), 1, 32)
    assert seen == [torch.float32]
    assert {value.dtype for value in engine.state().values()} == {np.dtype(np.float32)}
    exact = engine_of()
    exact.step(iter([(x, y)]), 1, 32)
    first, second = (e.state()["adam.W.exp_avg"] for e in (engine, exact))
    assert np.abs(first - second).max() > 0, "nothing was rounded"
    np.testing.assert_allclose(first, second, atol=0.02 * np.abs(second).max())


@pytest.mark.parametrize("type_", tiered(["lora"], ["mlp", "affine"]))
def test_bfloat16_reaches_what_float32_reaches(tmp_path: Path, type_: str) -> None:
    data = ready(tmp_path / "s.zarr", "low-rank", n=4000, d=48)
    r2 = [data.r2(run(data, type_, rank=4, precision=p).trained.aligner) for p in ("float32", "bfloat16")]
    assert r2[1] == pytest.approx(r2[0], abs=0.003)


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SpecError, match="--device cuda: torch sees no CUDA device here; use --device cpu"):
        accelerator_for(Placement(device="cuda"))


# What is told.


def test_an_epoch_has_all_its_figures(data: Ready) -> None:
    outcome = run(data, "lora", rank=4, epochs=2, loss="mse=1,infonce=0.5")
    before, *after = outcome.epochs
    assert before.recent_loss is before.grad_norm is before.train_loss is None
    for record in outcome.epochs:
        parts = record.val_parts
        assert set(parts) == {"mse", "cosine", "infonce", "infonce_top1", "infonce_chance", "infonce_gain"}
        # The unit of the MSE is the train variance, that of R2 the validation split's about the train mean.
        assert parts["mse"] == pytest.approx(record.val_loss, rel=0.2)
        assert parts["infonce_gain"] == pytest.approx(parts["infonce_chance"] - parts["infonce"])
        assert parts["infonce_chance"] == pytest.approx((128 * math.log(128) + 72 * math.log(72)) / 200)
        assert parts["infonce"] < 0.5
    for record in after:
        assert record.train_loss == pytest.approx(record.parts["mse"] + 0.5 * record.parts["infonce"], rel=1e-5)
        assert record.grad_norm is not None
        assert 0 < record.grad_norm < 10
    assert after[-1].val_parts["mse"] < before.val_parts["mse"]
    # An epoch of 13 steps is shorter than the window.
    for record in after:
        assert record.recent_loss == pytest.approx(record.train_loss)


def test_the_recent_loss_is_of_the_last_steps(data: Ready) -> None:
    [_, record] = run(data, "affine", epochs=1, batch_size=8, patience=1).epochs
    assert record.recent_loss is not None
    assert record.train_loss is not None
    assert record.recent_loss < record.train_loss - 0.01


def test_step_events(data: Ready) -> None:
    outcome = run(data, "mlp", epochs=2, batch_size=64, cka_every=10, hidden=16)
    assert [(e["epoch"], e["step"]) for e in outcome.events] == [(1, 10), (1, 20), (2, 30), (2, 40), (2, 50)]
    for event in outcome.events:
        assert set(event) == {"event", "epoch", "step", "lr", "loss", "cka", "cka_seconds"}
        assert event["event"] == "step"
        assert 0 < event["cka"] <= 1
        assert event["cka_seconds"] > 0
        assert event["lr"] == one_cycle(event["step"], 50, 0.02)[0]
    assert run(data, "mlp", epochs=1, cka_every=0, hidden=16).events == []


def test_the_probe_is_the_metric(data: Ready) -> None:
    module = build_module(Shape("mlp", hidden=16), data.moments)
    probe = CkaProbe(data.val, 0, torch.device("cpu"))
    [block] = data.val.blocks(1000)
    with torch.no_grad():
        mapped = module(torch.from_numpy(block.x)).numpy()
        expected, _ = debiased_cka(block.y, mapped, data.val.pairs.document[block.pairs])
    value, seconds = probe(module)
    assert value == pytest.approx(expected, abs=1e-6)
    assert seconds > 0
    # A map that predicts the mean has no similarity structure.
    assert probe(build_module(Shape("affine"), data.moments))[0] is None


def test_the_probe_takes_a_sample_and_refuses_to_guess(tmp_path: Path) -> None:
    data = ready(tmp_path / "s.zarr", n=6000, d=8)
    module = build_module(Shape("lora", rank=2), data.moments)
    assert len(data.val) == 600
    sampled = [CkaProbe(data.val, seed, torch.device("cpu"))(module)[0] for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    few = replace(data.val, pairs=data.val.pairs.where(np.arange(600) < 3))
    assert CkaProbe(few, 0, torch.device("cpu"))(module)[0] is None


# When it ends.


def test_a_loss_that_explodes_names_the_step_and_keeps_the_state(
    data: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def spoil(*arguments: Any, **named: Any) -> Any:
        nonlocal steps
        steps += torch.is_grad_enabled()
        total, parts = combined(*arguments, **named)
        return total * (math.nan if steps == 25 + 11 else 1.0), parts

    combined = align.training.losses.combined
    monkeypatch.setattr(align.training.losses, "combined", spoil)
    words = (
        r"^a:1->b:1: the loss became nan at epoch 2, step 11; the last good epoch was 1: "
        rf"use a smaller --lr than 0\.02; its state is in {tmp_path}$"
    )
    options = {"epochs": 3, "batch_size": 64, "hidden": 16}
    epochs: list[Epoch] = []
    with pytest.raises(FitError, match=words):
        align.training.loop.train_map(
            training_plan(map_type("mlp"), LoopSettings(**options)), PAIR, data.moments, data.train, data.val,
            on_epoch=epochs.append, checkpoint=tmp_path,
        )  # fmt: skip
    assert [record.epoch for record in epochs] == [0, 1]
    monkeypatch.undo()
    # The state is that of the end of the first epoch, and training goes on from it.
    resumed = run(data, "mlp", checkpoint=tmp_path, resume=True, **options)
    for name, tensor in run(data, "mlp", **options).trained.aligner.tensors.items():
        np.testing.assert_array_equal(resumed.trained.aligner.tensors[name], tensor)


def test_no_state_is_written_with_bad_weights(data: Ready, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(data, "affine", epochs=1, checkpoint=tmp_path)
    before = (tmp_path / FILE).read_bytes()
    monkeypatch.setattr(Engine, "sound", lambda _: False)
    with pytest.raises(FitError, match="a weight became nan at epoch 1, step 3"):
        run(data, "affine", epochs=2, checkpoint=tmp_path, resume=False, checkpoint_every=3)
    assert (tmp_path / FILE).read_bytes() != before, "epoch 0 of the new training"
    monkeypatch.undo()
    engine = engine_of()
    assert engine.sound()
    engine.step(iter([rows(4, 0)]), 1, 4)
    with torch.no_grad():
        next(engine.average.parameters())[2, 3] = math.inf
    assert not engine.sound()


# How far the defaults get.


def test_defaults_fill_in_what_is_not_said() -> None:
    assert training_plan(map_type("lora"), LoopSettings()).schedule.lr == 0.02
    assert training_plan(map_type("mlp"), LoopSettings()).schedule.batch_size == 128
    schedule = training_plan(map_type("mlp"), LoopSettings(lr=1e-3, batch_size=7)).schedule
    assert (schedule.lr, schedule.batch_size) == (1e-3, 7)
    windows = windows_plan(map_type("compress"), LoopSettings())
    assert (windows.lr, windows.batch_size) == (2e-3, 4)


@pytest.mark.parametrize(("d", "n"), tiered([(64, 4000)], [(256, 6000), (1024, 4000)]))
def test_mlp_keeps_up_with_ridge_without_tuning(tmp_path: Path, d: int, n: int) -> None:
    data = ready(tmp_path / "s.zarr", "low-rank", n=n, d=d, rank=max(d // 16, 4))
    trained = run(data, "mlp", cka_every=0, hidden=min(1024, 4 * d)).trained
    assert data.r2(trained.aligner) > data.closed("affine") - 0.01
    assert data.closed("procrustes") < data.closed("affine") - 0.02, "the skip alone would do"


@pytest.mark.parametrize(("d", "n"), [(64, 4000), (256, 6000)])
def test_lora_reaches_reduced_rank_without_tuning(tmp_path: Path, d: int, n: int) -> None:
    data = ready(tmp_path / "s.zarr", "low-rank", n=n, d=d, rank=4)
    trained = run(data, "lora", rank=4, cka_every=0).trained
    assert data.r2(trained.aligner) > data.closed("reduced-rank", rank=4, skip="procrustes") - 0.005
    assert data.closed("procrustes") < data.closed("reduced-rank", rank=4, skip="procrustes") - 0.02


@pytest.mark.parametrize("d", tiered([32], [96]))
def test_mlp_finds_what_no_matrix_can(tmp_path: Path, d: int) -> None:
    data = ready(tmp_path / "s.zarr", n=6000, d=d)
    assert data.r2(run(data, "mlp", cka_every=0, hidden=256).trained.aligner) > data.closed("affine") + 0.03


@pytest.mark.parametrize("skip", tiered(["ridge"], ["none", "identity"]))
def test_mlp_adds_to_any_skip(tmp_path: Path, skip: str) -> None:
    data = ready(tmp_path / "s.zarr", n=6000, d=32)
    outcome = run(data, "mlp", cka_every=0, hidden=256, skip=skip)
    assert outcome.trained.aligner.options["skip"] == skip
    assert data.r2(outcome.trained.aligner) > data.closed("affine") + 0.02


@pytest.mark.parametrize("type_", ["lora", "mlp"])
def test_from_independent_data_nothing_is_learned(tmp_path: Path, type_: str) -> None:
    data = ready(tmp_path / "s.zarr", "independent", n=4000, d=24)
    outcome = run(data, type_, rank=4, skip="none", loss="mse=1,infonce=1", temperature=1.0, hidden=32, patience=10)
    parts = outcome.epochs[-1].val_parts
    assert parts["infonce"] == pytest.approx(parts["infonce_chance"], abs=0.05)
    assert abs(parts["infonce_gain"]) < 0.05
    assert data.r2(outcome.trained.aligner) < 0.005
    assert outcome.trained.best_epoch <= 1


# Other places for figures.


def test_tensorboard_gets_every_figure(data: Ready, tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "left.over").write_text("")
    with tracking("tensorboard", Placement(), tmp_path, {}) as tracker:
        outcome = run(data, "lora", epochs=1, rank=2, cka_every=5)
        for record in outcome.epochs:
            tracker.epoch(PAIR.key, record)
        for event in outcome.events:
            tracker.step(PAIR.key, event)
    [file] = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    for name in ("loss/train", "loss/val", "train/mse", "val/infonce_gain", "val/r2", "val/cka", "lr", "grad_norm"):
        assert f"a.1-b.1/epoch/{name}".encode() in content, name
    for name in ("loss", "cka", "lr"):
        assert f"a.1-b.1/step/{name}".encode() in content, name


def test_what_is_unknown_is_not_sent() -> None:
    sent: list[tuple[dict[str, float], int]] = []
    tracker = Tracker(lambda figures, at: sent.append((dict(figures), at)))
    tracker.epoch("a:1->b:1", Epoch(0, None, 0.5, {"r2": 0.5, "cka_debiased": None}, 0.1, 2.0))
    tracker.step("a:1->b:1", {"event": "step", "epoch": 1, "step": 7, "lr": 0.1, "loss": 0.2, "cka": None})
    prefix = "a.1-b.1/epoch"
    assert sent[0] == (
        {f"{prefix}/loss/val": 0.5, f"{prefix}/val/r2": 0.5, f"{prefix}/lr": 0.1, f"{prefix}/seconds": 2.0},
        0,
    )
    assert sent[1] == ({"a.1-b.1/step/loss": 0.2, "a.1-b.1/step/lr": 0.1}, 7)


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    with tracking("none", Placement(), tmp_path, {}) as tracker:
        tracker.step("a:1->b:1", {"step": 1, "lr": 0.1, "loss": 0.2, "cka": 0.3})
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_is_not_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        align.training.tracking, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda _: None))
    )
    with pytest.raises(MissingPackageError, match=r"--tracker wandb needs the package wandb.*or use --tracker none"):
        check_tracker("wandb")
    with (
        pytest.raises(MissingPackageError, match=r"needs the package tensorboardX.*pip install 'featstore\[align\]'"),
        tracking("tensorboard", Placement(), tmp_path, {}),
    ):
        pass
    with pytest.raises(SpecError, match="--tracker 'mlflow': choose one of tensorboard, wandb, none"):
        check_tracker("mlflow")
    check_tracker("none")
