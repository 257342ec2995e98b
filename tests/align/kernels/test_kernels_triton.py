"""The Triton kernels themselves: on a GPU where there is one, otherwise in triton's interpreter.

TRITON_INTERPRET must be set before triton is imported, so without a GPU `test_kernels.py` starts this file in a process
of its own; here it is left out.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("without a GPU the kernels run in a process with TRITON_INTERPRET=1", allow_module_level=True)

from align.kernels import reference  # noqa: E402
from align.kernels.api import cka_matrix, compare_layers  # noqa: E402
from align.kernels.centre import Centred, centre  # noqa: E402
from align.kernels.panels import panel_sums  # noqa: E402
from align.kernels.triton import launch  # noqa: E402
from align.kernels.triton.launch import cross_square, triton_path  # noqa: E402
from align.solvers.row_effects import Documents  # noqa: E402
from tests.support.residuals import cosine_of_kernels  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
PATHS = ("descriptors", "pointers") if INTERPRETED or triton_path(DEVICE) == "descriptors" else ("pointers",)
#: Tensor cores do not round every sum as float32 would.
LOOSER = 1 if INTERPRETED else 10
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def widened(handle: Any) -> Any:
    """Operand of a product: the interpreter holds bfloat16 as its bits."""
    import triton.language as tl

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return type(handle)(data, tl.float32)


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """Products of bfloat16 in the interpreter multiply the numbers, not their bits; gives triton's own method."""
    if not INTERPRETED:
        return None
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *rest):
        return original(self, widened(a), widened(b), d, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    # An interpreted step takes a millisecond, however long it is.
    monkeypatch.setattr(launch, "CONTRACT_STEP", 1024)
    return original


def states(n: int, widths: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Layers with something in common, about a mean, in which a few rows are sinks."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n, 9))
    layers = []
    for width in widths:
        x = shared @ rng.normal(size=(9, width)) + 2 * rng.normal(size=(n, width)) + 5 * rng.normal(size=width)
        x[:: n // 3, 1] += 40
        layers.append(torch.tensor(x, dtype=dtype, device=DEVICE))
    return layers


def grams(layers: list[Centred], sigmas: list[float] | None) -> list[np.ndarray]:
    """Float64 Gram matrices of the very numbers that the kernels multiply."""
    rows = [x.rows.double().cpu().numpy() for x in layers]
    if sigmas is None:
        return [x @ x.T for x in rows]
    return [reference.rbf_gram(x, s) for x, s in zip(rows, sigmas, strict=True)]


def naive(matrices: list[np.ndarray], estimator: str) -> np.ndarray:
    return np.array([[reference.cka(k, m, estimator) for m in matrices] for k in matrices])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [(torch.bfloat16, "linear"), (torch.bfloat16, "rbf"), (torch.float16, "linear"), (torch.float32, "rbf")],
    ids=str,
)
def test_panels_are_the_gram_matrices(path, dtype, kernel):
    """300 samples: on macro-tiles of 256 one is beside the diagonal, on one of 512 are several tiles; odd widths."""
    size = 256 if path == "descriptors" else 512
    layers = [centre(x, "tensor") for x in states(300, (33, 70, 128), dtype)]
    assert {x.rows.dtype for x in layers} == {dtype}
    sigmas = None if kernel == "linear" else [3.0, 6.0, 9.0]
    found = panel_sums(layers, sigmas, path=path, size=size)
    expected = grams(layers, sigmas)
    for k, gram in enumerate(expected):
        shift = 1 - float(found.diagonal[k, 0]) if kernel == "rbf" else 0.0
        off = gram - shift
        np.fill_diagonal(off, 0.0)
        assert np.abs(found.rows[k].cpu().numpy() - off.sum(1)).max() < LOOSER * 1e-6 * np.abs(off).sum(1).max()
        for m, other in enumerate(expected):
            product = np.triu(off * (other - (1 - float(found.diagonal[m, 0]) if kernel == "rbf" else 0.0)), 1).sum()
            assert abs(float(found.products[k, m]) - product) < LOOSER * 1e-6 * np.sqrt(
                (gram**2).sum() * (other**2).sum()
            )
    for estimator in ("debiased", "biased"):
        hsic = found.hsic(estimator)[0].cpu().numpy()
        cka = hsic / np.sqrt(np.outer(np.diag(hsic), np.diag(hsic)))
        assert np.abs(cka - naive(expected, estimator)).max() < LOOSER * (1e-6 if kernel == "linear" else 5e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_pairs_within_documents_are_zero(path, kernel):
    """Documents that end within tiles, on their edges and across macro-tiles; the last row alone."""
    documents = Documents(np.array([100, 1, 27, 128, 43, 1]))
    labels = np.repeat(np.arange(6), documents.sizes)
    layers = [centre(x, "tensor") for x in states(300, (33, 70), torch.float32)]
    sigmas = None if kernel == "linear" else [3.0, 6.0]
    found = panel_sums(layers, sigmas, documents=documents, path=path, size=256)
    expected = grams(layers, sigmas)
    for k, gram in enumerate(expected):
        shift = 1 - float(found.diagonal[k, 0]) if kernel == "rbf" else 0.0
        off = np.where(labels[:, None] == labels, 0, gram - shift)
        assert np.abs(found.rows[k].cpu().numpy() - off.sum(1)).max() < LOOSER * 1e-6 * np.abs(off).sum(1).max()
    hsic = found.hsic("debiased")[0].cpu().numpy()
    cka = hsic / np.sqrt(np.outer(np.diag(hsic), np.diag(hsic)))
    assert cka[0, 1] == pytest.approx(cosine_of_kernels(*expected, labels), abs=LOOSER * 5e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_cross_square_is_the_norm_of_the_cross_covariance(path, dtype):
    """Widths beyond one tile in either direction, none a multiple of a tile; a self term is the symmetric half."""
    x, y = (centre(x, "tensor").rows for x in states(77, (300, 261), dtype))
    for a, b in ((x, y), (y, x), (x, x), (y, y)):
        expected = (a.double().T @ b.double()).square().sum()
        assert float(cross_square(a, b, path)) == pytest.approx(float(expected), rel=LOOSER * 1e-6)


def test_more_layers_than_one_block_of_the_contraction():
    """The contraction takes 64 layers by 64 at most."""
    layers = [centre(x, "tensor") for x in states(60, (8,) * 66, torch.float32)]
    expected = grams(layers, None)
    products = panel_sums(layers, None, path=PATHS[0], size=256).products.cpu().numpy()
    naive_products = np.array([[np.triu(k * m, 1).sum() for m in expected] for k in expected])
    assert np.abs(products - naive_products).max() < LOOSER * 1e-6 * np.abs(naive_products).max()


@pytest.mark.parametrize(
    ("form", "kernel", "dtype"),
    [
        ("feature", "linear", torch.bfloat16),
        ("feature", "linear", torch.float32),
        ("panels", "linear", torch.float32),
        ("panels", "rbf", torch.bfloat16),
    ],
    ids=str,
)
def test_whole_matrices_through_the_kernels(form, kernel, dtype):
    """Against float64 of the inputs as they were given, so rounding after centring is part of the error."""
    layers = states(250, (60, 35), dtype)
    found = compare_layers(layers, kernel=kernel, form=form, backend="triton")
    assert (found.backend, found.form) == ("triton", form)
    expected = naive(
        [
            reference.gram(x.double().cpu().numpy(), kernel, s)
            for x, s in zip(layers, found.sigmas or (None,) * 2, strict=True)
        ],
        "debiased",
    )
    assert np.abs(found.cka() - expected).max() < (1e-4 if dtype == torch.bfloat16 else 1e-5)
    again = compare_layers(layers, kernel=kernel, form=form, backend="triton")
    assert found.hsic.tobytes() == again.hsic.tobytes()


def test_layers_of_different_types_meet():
    """A bfloat16 layer and a float32 layer have no product in common: the torch library multiplies them."""
    x, y = states(300, (20, 24), torch.float32)
    layers = [x.to(torch.bfloat16), y]
    expected = naive([reference.linear_gram(x.double().cpu().numpy()) for x in layers], "debiased")
    for form in ("feature", "panels"):
        assert np.abs(cka_matrix(layers, form=form, backend="triton") - expected).max() < 1e-4


def test_sinks_do_not_swallow_the_rest():
    """Rows a thousand times the others, alone in a panel's chunk: float32 sums over a chunk would lose 3e-6."""
    layers = states(250, (40, 50), torch.float32)
    for x in layers:
        x[::100, 1] += 4000
    rows = [centre(x, "tensor") for x in layers]
    expected = naive(grams(rows, None), "debiased")
    for path in PATHS:
        hsic = panel_sums(rows, None, path=path).hsic("debiased")[0].cpu().numpy()
        cka = hsic / np.sqrt(np.outer(np.diag(hsic), np.diag(hsic)))
        assert np.abs(cka - expected).max() < LOOSER * 1e-6


@pytest.mark.parametrize("path", PATHS)
def test_no_kernel_value_exceeds_one(path):
    """Equal rows far from the origin, whose distances come out of the subtraction as rounding of either sign."""
    far = np.random.default_rng(0).normal(size=(10, 33)) * 1000
    layer = centre(torch.tensor(np.repeat(far, 20, axis=0), dtype=torch.float32, device=DEVICE), "tensor")
    assert panel_sums([layer], [layer.scale], path=path, size=256).rows.max() <= 19


def test_what_one_macro_tile_leaves_does_not_reach_the_next():
    """Macro-tiles of 512 have a tile below the diagonal, which those on the diagonal skip and the others write."""
    layers = [centre(x, "tensor") for x in states(530, (8, 12), torch.float32)]
    found = panel_sums(layers, None, path=PATHS[0], size=512).hsic("debiased")[0].cpu().numpy()
    cka = found / np.sqrt(np.outer(np.diag(found), np.diag(found)))
    assert np.abs(cka - naive(grams(layers, None), "debiased")).max() < LOOSER * 1e-6


def test_operands_are_padded_and_order_covers_every_tile():
    x = torch.ones((5, 65), dtype=torch.float32, device=DEVICE)
    padded = launch.operand(x)
    assert padded.shape == (5, 96)
    assert float(padded.sum()) == 5 * 65
    whole = launch.operand(padded)
    assert whole is padded


@pytest.mark.skipif(not INTERPRETED, reason="asks what the interpreter does")
def test_the_interpreter_still_multiplies_the_bits_of_bfloat16(untouched, monkeypatch):
    """When this fails, triton has mended its interpreter: remove `untouched`, `widened` and this test."""
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_dot", untouched)
    x, y = (centre(x, "tensor").rows for x in states(77, (30, 20), torch.bfloat16))
    expected = float((x.double().T @ y.double()).square().sum())
    with np.errstate(all="ignore"):
        found = float(cross_square(x, y, "descriptors"))
    assert found != pytest.approx(expected, rel=1e-2)
