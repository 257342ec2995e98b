"""Trained maps: what they start from, what they export, and that they reach the closed form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from align.layers import LayerPair
from align.maps.fitted import Aligner
from align.moments.scatter import centered, moments_of
from align.solvers import RidgePath, mse_of, reduced_rank, whitening
from align.training.building import _left_over
from align.training.mlp import HiddenLayerMap
from align.training.modules import LinearMap, LowRankMap
from featstore.errors import FitError

DX, DY, R = 7, 5, 3


def arrays(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "mean_source": rng.standard_normal(DX),
        "mean_target": rng.standard_normal(DY),
        "preconditioner": rng.standard_normal((DX, DX)),
        "input_scale": 3.0,
        "output_scale": 5.0,
    }


def low_rank(*, with_skip: bool = True, **changes: Any) -> LowRankMap:
    matrix = np.random.default_rng(1).standard_normal((DX, DY)) if with_skip else None
    return LowRankMap(DX, DY, R, **{"skip": matrix, "alpha": 6.0, **arrays(), **changes})


def disturb(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))


def apply(tensors: dict[str, Any], x: Any) -> Any:
    return (x - tensors["mean_source"]) @ tensors["weight"] + tensors["mean_target"]


class TestLowRankMap:
    def test_starts_at_the_skip_map(self) -> None:
        module = low_rank()
        x = np.random.default_rng(2).standard_normal((10, DX)).astype(np.float32)
        with torch.no_grad():
            y_hat = module(torch.from_numpy(x)).numpy()
        a = arrays()
        skip = np.random.default_rng(1).standard_normal((DX, DY))
        np.testing.assert_allclose(y_hat, (x - a["mean_source"]) @ skip + a["mean_target"], atol=1e-5)
        assert not module.export()["lora_B"].any()

    def test_a_starts_with_variance_one_over_width_and_follows_the_seed(self) -> None:
        wide = LowRankMap(400, 300, 200)
        assert wide.A.std().item() == pytest.approx(400**-0.5, rel=0.02)
        assert torch.equal(wide.A, LowRankMap(400, 300, 200).A)
        assert not torch.equal(wide.A, LowRankMap(400, 300, 200, seed=1).A)
        before = torch.get_rng_state()
        LowRankMap(4, 4, 2)
        assert torch.equal(before, torch.get_rng_state()), "the global generator was touched"

    @pytest.mark.parametrize("skip", [True, False])
    @pytest.mark.parametrize("preconditioned", [True, False])
    def test_export_is_the_forward_pass(self, *, skip: bool, preconditioned: bool) -> None:
        changes = {} if preconditioned else {"preconditioner": None}
        module = low_rank(with_skip=skip, **changes)
        disturb(module)
        x = np.random.default_rng(3).standard_normal((2, 6, DX)).astype(np.float32)
        with torch.no_grad():
            y_hat = module(torch.from_numpy(x)).numpy()
        tensors = module.export()
        assert {k: v.shape for k, v in tensors.items()} == {
            "weight": (DX, DY),
            "mean_source": (DX,),
            "mean_target": (DY,),
            "lora_A": (DX, R),
            "lora_B": (R, DY),
            "skip": (DX, DY),
        }
        assert all(v.dtype == np.float32 for v in tensors.values())
        np.testing.assert_allclose(apply(tensors, x), y_hat, rtol=1e-4, atol=1e-4)
        assert tensors["skip"].any() == skip

    def test_weight_is_skip_plus_the_scaled_product_to_the_last_bit(self) -> None:
        module = low_rank()
        disturb(module)
        t = module.export()
        double = {k: t[k].astype(np.float64) for k in ("skip", "lora_A", "lora_B")}
        product = double["lora_A"] @ double["lora_B"]
        expected = (double["skip"] + 6.0 / R * product).astype(np.float32)
        np.testing.assert_array_equal(t["weight"], expected)

    def test_effective_factors_contain_preconditioner_and_units(self) -> None:
        module = low_rank()
        disturb(module)
        a = arrays()
        lora_a, lora_b = (t.detach().numpy() for t in module.lora())
        np.testing.assert_allclose(lora_a, a["preconditioner"] @ module.A.detach().numpy() / 3.0, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(lora_b, 5.0 * module.B.detach().numpy(), rtol=1e-5)
        np.testing.assert_allclose(module.export()["lora_A"], lora_a, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(module.export()["lora_B"], lora_b, rtol=1e-5)

    def test_only_the_factors_train(self) -> None:
        module = low_rank()
        assert [name for name, _ in module.named_parameters()] == ["A", "B"]
        assert module.trainable_parameters() == R * (DX + DY)
        assert module.shipped_parameters() == R * (DX + DY) + DX * DY + DX + DY
        assert low_rank(with_skip=False).shipped_parameters() == R * (DX + DY) + DX + DY

    def test_default_alpha_is_the_rank(self) -> None:
        module = LowRankMap(DX, DY, R)
        disturb(module)
        tensors = module.export()
        np.testing.assert_allclose(tensors["weight"], tensors["lora_A"] @ tensors["lora_B"], rtol=1e-5, atol=1e-6)

    def test_state_survives_saving(self) -> None:
        module, other = low_rank(), low_rank(seed=4)
        disturb(module)
        other.load_state_dict(module.state_dict())
        for name, value in module.export().items():
            np.testing.assert_array_equal(other.export()[name], value)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"skip": np.zeros((DY, DX))}, "skip has shape"),
            ({"skip": np.full((DX, DY), np.nan)}, "skip holds NaN"),
            ({"mean_source": np.zeros(DY)}, "mean_source has shape"),
            ({"mean_target": np.zeros(DX)}, "mean_target has shape"),
            ({"preconditioner": np.zeros((DX, DY))}, "preconditioner has shape"),
            ({"input_scale": 0.0}, "input_scale"),
            ({"output_scale": float("inf")}, "output_scale"),
            ({"alpha": -1.0}, "alpha"),
        ],
    )
    def test_bad_input_is_named(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(FitError, match=message):
            low_rank(**changes)

    @pytest.mark.parametrize("rank", [0, 6])
    def test_rank_must_fit(self, rank: int) -> None:
        with pytest.raises(FitError, match="use 1 to 5"):
            LowRankMap(DX, DY, rank)
        with pytest.raises(FitError, match="widths"):
            LowRankMap(0, DY, 1)


class TestLinearMap:
    def test_starts_as_the_mean_prediction(self) -> None:
        module = LinearMap(DX, DY, **arrays())
        with torch.no_grad():
            y_hat = module(torch.randn(4, DX)).numpy()
        np.testing.assert_allclose(y_hat, np.tile(arrays()["mean_target"], (4, 1)), rtol=1e-5)

    @pytest.mark.parametrize("preconditioned", [True, False])
    def test_export_is_the_forward_pass(self, *, preconditioned: bool) -> None:
        module = LinearMap(DX, DY, **(arrays() | ({} if preconditioned else {"preconditioner": None})))
        disturb(module)
        x = np.random.default_rng(5).standard_normal((2, 6, DX)).astype(np.float32)
        with torch.no_grad():
            y_hat = module(torch.from_numpy(x)).numpy()
        tensors = module.export()
        assert set(tensors) == {"weight", "mean_source", "mean_target"}
        assert all(v.dtype == np.float32 for v in tensors.values())
        np.testing.assert_allclose(apply(tensors, x), y_hat, rtol=1e-4, atol=1e-4)

    def test_without_means_there_is_no_intercept(self) -> None:
        module = LinearMap(DX, DY)
        disturb(module)
        with torch.no_grad():
            assert not module(torch.zeros(3, DX)).any()

    def test_counts(self) -> None:
        module = LinearMap(DX, DY, **arrays())
        assert module.trainable_parameters() == DX * DY
        assert module.shipped_parameters() == DX * DY + DX + DY


H = 11


def hidden_layer(*, with_skip: bool = True, **changes: Any) -> HiddenLayerMap:
    matrix = np.random.default_rng(1).standard_normal((DX, DY)) if with_skip else None
    return HiddenLayerMap(DX, DY, H, **{"skip": matrix, **arrays(), **changes})


class TestHiddenLayerMap:
    def test_starts_at_the_skip_map(self) -> None:
        module, linear = hidden_layer(), low_rank()
        x = torch.randn(10, DX, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            np.testing.assert_allclose(module(x), linear(x), atol=1e-5)
            assert module(x).equal(hidden_layer(seed=5)(x))
        exported = module.export()
        assert not exported["output_weight"].any()
        assert not exported["output_bias"].any()

    def test_starts_with_units_of_variance_one_on_whitened_input(self) -> None:
        module = HiddenLayerMap(400, 3, 300)
        units = torch.randn(500, 400) @ torch.from_numpy(module.export()["hidden_weight"])
        assert units.std().item() == pytest.approx(1, rel=0.03)
        assert torch.equal(module.H, HiddenLayerMap(400, 3, 300).H)
        assert not torch.equal(module.H, HiddenLayerMap(400, 3, 300, seed=1).H)

    @pytest.mark.parametrize("skip", [True, False])
    @pytest.mark.parametrize("preconditioned", [True, False])
    def test_export_is_the_forward_pass_and_the_aligner_s(self, *, skip: bool, preconditioned: bool) -> None:
        changes = {} if preconditioned else {"preconditioner": None}
        module = hidden_layer(with_skip=skip, **changes)
        disturb(module)
        x = np.random.default_rng(3).standard_normal((6, DX)).astype(np.float32)
        with torch.no_grad():
            y_hat = module(torch.from_numpy(x)).numpy()
        tensors = module.export()
        shapes = {
            "skip": (DX, DY),
            "mean_source": (DX,),
            "mean_target": (DY,),
            "hidden_weight": (DX, H),
            "hidden_bias": (H,),
            "output_weight": (H, DY),
            "output_bias": (DY,),
        }
        if not skip:
            del shapes["skip"]
        assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
        assert all(tensor.dtype == np.float32 for tensor in tensors.values())
        double = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
        centred = x - double["mean_source"]
        units = centred @ double["hidden_weight"] + double["hidden_bias"]
        expected = units / (1 + np.exp(-units)) @ double["output_weight"] + double["output_bias"]
        expected += double["mean_target"] + (centred @ double["skip"] if skip else 0)
        np.testing.assert_allclose(y_hat, expected, rtol=1e-4, atol=1e-4)
        controls = {"control_mean_source": tensors["mean_source"], "control_mean": tensors["mean_target"]}
        aligner = Aligner(LayerPair("a", (1,), "b", 1), {**tensors, **controls}, kind="mlp")
        np.testing.assert_allclose(aligner.apply(x), expected, rtol=1e-4, atol=1e-4)
        assert aligner.shipped == module.shipped_parameters()

    def test_counts(self) -> None:
        trained = DX * H + H + H * DY + DY
        assert hidden_layer().trainable_parameters() == trained
        assert hidden_layer().shipped_parameters() == trained + DX * DY + DX + DY
        assert hidden_layer(with_skip=False).shipped_parameters() == trained + DX + DY

    def test_bad_input_is_named(self) -> None:
        with pytest.raises(FitError, match="--hidden 0: a hidden layer needs at least 1 unit"):
            HiddenLayerMap(DX, DY, 0)
        with pytest.raises(FitError, match="skip has shape"):
            hidden_layer(skip=np.zeros((DY, DX)))


@pytest.mark.parametrize("kind", ["lora", "mlp", "affine"])
def test_mixed_precision_leaves_small_directions_alone(kind: str) -> None:
    # One direction a thousand times the rest; whitened, all are alike. Rounded before P, the small ones would be noise.
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    scales = np.r_[1000.0, np.ones(39)]
    x = torch.from_numpy(rng.standard_normal((300, 40)) * scales @ basis).float()
    common: dict[str, Any] = {"preconditioner": basis.T / scales @ basis}
    modules: dict[str, Any] = {
        "lora": lambda: LowRankMap(40, 8, 8, **common),
        "mlp": lambda: HiddenLayerMap(40, 8, 16, **common),
        "affine": lambda: LinearMap(40, 8, **common),
    }
    module = modules[kind]()
    disturb(module)
    with torch.no_grad():
        exact = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = module(x)
    assert rounded.dtype == torch.float32
    assert (rounded != exact).any(), "mixed precision was not on"
    error = (rounded - exact).std() / exact.std()
    assert error < 0.01


def anisotropic(seed: int) -> tuple[Any, Any]:
    """Source states whose directions differ a hundredfold in spread, all of which matter."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((2000, 12)) * np.logspace(0, 2, 12)) @ np.linalg.qr(rng.standard_normal((12, 12)))[0]
    low = rng.standard_normal((12, 4)) @ rng.standard_normal((4, 10))
    y = x @ np.linalg.inv(np.cov(x.T)) @ low
    return x + 5.0, y + 0.3 * y.std() * rng.standard_normal(y.shape) - 1.0


def train(module: torch.nn.Module, x: Any, y: Any, steps: int, lr: float) -> None:
    tx, ty = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    optimiser = torch.optim.Adam(module.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(module(tx), ty).backward()
        optimiser.step()
        schedule.step()


class TestTrainingReachesTheClosedForm:
    """With the preconditioner a few hundred steps do what is hopeless without."""

    def excess(self, kind: str, *, preconditioned: bool) -> float:
        x, y = anisotropic(6)
        m = centered(moments_of(x, y, x.mean(0), y.mean(0)))
        spread = float(np.sqrt(np.trace(m.gx) / (m.n * 12)))
        common: dict[str, Any] = {
            "mean_source": m.mean_x,
            "mean_target": m.mean_y,
            "output_scale": float(y.std()),
        }
        if preconditioned:
            common["preconditioner"] = whitening(m.gx, m.n, eps=1e-6)
        else:
            common["input_scale"] = spread
        if kind == "linear":
            module: torch.nn.Module = LinearMap(12, 10, **common)
            best = mse_of(RidgePath(m.gx, m.c).weight(0.0), m)
        else:
            module = LowRankMap(12, 10, 3, **common)
            best = mse_of(np.matmul(*reduced_rank(m.gx, m.c, 3, 0.0)), m)
        train(module, x, y, 300, 0.05)
        return mse_of(module.export()["weight"], m) / best - 1

    @pytest.mark.parametrize("kind", ["linear", "lora"])
    def test_excess_error(self, kind: str) -> None:
        assert 0 <= self.excess(kind, preconditioned=True) < 0.01
        assert self.excess(kind, preconditioned=False) > 0.2


def test_what_a_skip_leaves_over_has_the_diagonal_of_its_gram_matrix() -> None:
    rng = np.random.default_rng(4)
    x, y, skip = (rng.standard_normal(shape) for shape in ((40, 5), (40, 4), (5, 4)))
    whole = centered(moments_of(x, y, np.zeros(5), np.zeros(4)))
    expected = centered(moments_of(x, y - x @ skip, np.zeros(5), np.zeros(4)))
    for rows in (whole, replace(whole, gy=np.diag(whole.gy))):
        left = _left_over(rows, skip)
        np.testing.assert_allclose(left.c, expected.c, atol=1e-12)
        np.testing.assert_allclose(left.gy, expected.gy if left.gy.ndim == 2 else np.diag(expected.gy), atol=1e-12)
