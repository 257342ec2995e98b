"""HSIC and CKA of every form against n x n formulas in float64, planted truth, and hard data."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import scipy.spatial
import torch

from align.kernels import reference
from align.kernels.api import cka_matrix, compare_layers, hsic_matrix
from align.kernels.blocks import feature_sums
from align.kernels.centre import centre, mean_of, round_to_tf32
from align.kernels.forms import NAIVE_ROWS, Form, choose_form
from align.kernels.panels import panel_size, panel_sums
from align.kernels.triton.launch import BM, BN, tile_order
from align.metrics import biased_cka, debiased_cka
from align.metrics.similarity import FEW_ROWS
from featstore.errors import FitError, MissingPackageError
from tests.support import ROOT
from tests.support.residuals import cosine_of_kernels

FORMS = [(form, kernel) for form in ("naive", "feature", "panels") for kernel in ("linear", "rbf")]
FORMS.remove(("feature", "rbf"))
TOLERANCE = {"linear": 1e-6, "rbf": 5e-6}


def common(n, seed=0, widths=(40, 64, 33)):
    """Layers of different widths that share a part."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n, 12))
    return [shared @ rng.normal(size=(12, d)) + (1 + k) * rng.normal(size=(n, d)) for k, d in enumerate(widths)]


def data(kind, n):
    layers = common(n)
    for x in layers:
        if kind == "mean of 10 sigma":
            x += 10 * x.std(0)
        elif kind == "one dimension at 1000":
            x[:, 3] = 1000 + 5 * np.random.default_rng(1).normal(size=n)
        elif kind == "sinks":
            x[:: n // 3, 5] += 1000
    return [torch.tensor(x, dtype=torch.float32) for x in layers]


def naive(layers, kernel, estimator, sigmas=None):
    """Float64, without anything of the package: Gram matrices by SciPy, U-centring written out."""
    grams = []
    for k, x in enumerate(layers):
        x = np.asarray(x.double() if isinstance(x, torch.Tensor) else x, dtype=np.float64)
        if kernel == "linear":
            grams.append((x - x.mean(0)) @ (x - x.mean(0)).T)
        else:
            squares = scipy.spatial.distance.pdist(x, "sqeuclidean")
            variance = np.median(squares) if sigmas is None else sigmas[k] ** 2
            grams.append(np.exp(-scipy.spatial.distance.squareform(squares) / (2 * variance)))
    n = len(grams[0])

    def hsic(a, b):
        if estimator == "biased":
            h = np.eye(n) - 1 / n
            return np.sum((h @ a @ h) * (h @ b @ h)) / (n - 1) ** 2
        centred = []
        for g in (a, b):
            g = g - np.diag(np.diag(g))
            u = g - (g.sum(0)[None, :] + g.sum(1)[:, None]) / (n - 2) + g.sum() / ((n - 1) * (n - 2))
            np.fill_diagonal(u, 0)
            centred.append(u)
        return np.sum(centred[0] * centred[1]) / (n * (n - 3))

    found = np.array([[hsic(a, b) for b in grams] for a in grams])
    root = np.sqrt(np.diag(found))
    return found, found / np.outer(root, root)


@pytest.mark.parametrize(
    "kind",
    [
        "benign",
        "sinks",
        pytest.param("mean of 10 sigma", marks=pytest.mark.thorough),
        pytest.param("one dimension at 1000", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("estimator", ["debiased", "biased"])
def test_every_form_is_the_formula(kind, kernel, estimator):
    layers = data(kind, 700)
    hsic, cka = naive(layers, kernel, estimator)
    for form in ("naive", "feature", "panels"):
        if (form, kernel) not in FORMS:
            continue
        found = compare_layers(layers, kernel=kernel, estimator=estimator, form=form)
        tolerance = 1e-9 if form == "naive" else TOLERANCE[kernel]
        assert np.abs(found.cka() - cka).max() < tolerance
        assert np.abs(found.hsic / hsic - 1).max() < 10 * tolerance
        assert (found.reasons, found.form, found.backend) == ({}, form, "torch")


@pytest.mark.parametrize(("form", "kernel"), FORMS)
def test_more_rows_than_a_block_and_the_same_bits_again(form, kernel):
    """Several macro-tiles with a ragged last one, several blocks of rows; other types; a second run."""
    layers = data("mean of 10 sigma", 1100)
    layers = [layers[0].to(torch.bfloat16), layers[1].double(), layers[2].to(torch.float16)]
    cka = naive(layers, kernel, "debiased")[1]
    found = cka_matrix(layers, kernel=kernel, form=form)
    assert found.dtype == np.float64
    assert np.abs(found - cka).max() < TOLERANCE[kernel]
    assert found.tobytes() == cka_matrix(layers, kernel=kernel, form=form).tobytes()


def test_blocks_of_rows_give_the_products_of_whole_layers():
    """Several widths, types and a ragged last block; one layer that does not vary, and one far from the origin."""
    rng = np.random.default_rng(0)
    core = rng.normal(size=(2500, 24))
    whole = [core @ rng.normal(size=(24, d)) + rng.normal(size=(2500, d)) for d in (24, 40, 33)]
    layers = [
        torch.tensor(whole[0]).to(torch.bfloat16),
        torch.tensor(1000 + whole[1], dtype=torch.float32),
        torch.full((2500, 8), 3.25),
        torch.tensor(1e-3 * whole[2]).to(torch.float16),
    ]
    pairs = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (2, 2), (3, 3)]
    found = feature_sums(layers, pairs)
    centred = [(x := layer.double()) - x.mean(0) for layer in layers]
    scales = [np.array(centre(layer).scale) for layer in layers]
    assert found.varies == [True, True, False, True]
    assert found.scales.tolist() == [float(scale) for scale in scales]
    for i, j in pairs:
        wanted = float((centred[i].T @ centred[j]).square().sum() * scales[i] ** 2 * scales[j] ** 2)
        assert found.fro[i, j] == found.fro[j, i] == pytest.approx(wanted, rel=2e-6)
    assert math.isnan(found.fro[1, 3])
    for own, rows, scale in zip(found.norms, centred, scales, strict=True):
        assert own == pytest.approx(rows.square().sum(1).numpy() * scale**2, rel=1e-4, abs=1e-12)


def test_sums_of_rows_beyond_float32():
    """Rows whose float32 sums overflow, though no row does; and one that is not finite."""
    x = common(600)[0].astype(np.float32) + np.float32(3e36)
    assert torch.isfinite(mean_of(torch.tensor(x))).all()
    x[71, 3] = math.inf
    with pytest.raises(FitError, match="row 71 holds a value that is not finite"):
        cka_matrix([x, x], form="feature")


def test_macro_tiles_do_not_matter():
    layers = [centre(x.double()) for x in data("benign", 900)]
    for sigmas in (None, [5.0, 9.0, 12.0]):
        few, many = (panel_sums(layers, sigmas, size=size).hsic("debiased")[0] for size in (1024, 256))
        assert torch.allclose(few, many, rtol=1e-12, atol=0)
    with pytest.raises(FitError, match="100 samples: give a multiple of 256"):
        panel_sums(layers, None, size=100)


def test_no_kernel_value_exceeds_one():
    """Equal rows far from the origin, whose distances come out of the subtraction as rounding of either sign."""
    far = np.random.default_rng(0).normal(size=(10, 33)) * 1000
    layer = centre(torch.tensor(np.repeat(far, 40, axis=0), dtype=torch.float32))
    sums = panel_sums([layer], [layer.scale]).rows
    assert sums.max() <= 39


@pytest.mark.parametrize("form", ["naive", "feature", "panels"])
def test_the_moments_of_the_rows_agree(form):
    """The project's other way to the same figures, from moments of pairs."""
    x, y = (t.numpy() for t in data("benign", FEW_ROWS + 100)[:2])
    assert cka_matrix([x, y], form=form)[0, 1] == pytest.approx(debiased_cka(x, y)[0], abs=1e-6)
    assert cka_matrix([x, y], form=form, estimator="biased")[0, 1] == pytest.approx(biased_cka(x, y)[0], abs=1e-6)


@pytest.mark.parametrize(("form", "kernel"), FORMS)
def test_a_rotated_scaled_shifted_copy_is_the_same(form, kernel):
    rng = np.random.default_rng(0)
    x = common(500)[0]
    turned = 7 * x @ np.linalg.qr(rng.normal(size=(40, 40)))[0] + rng.normal(size=40)
    found = cka_matrix([x.astype(np.float32), turned.astype(np.float32)], kernel=kernel, form=form)
    assert found[0, 1] == pytest.approx(1, abs=2e-6)
    assert np.array_equal(found, found.T)


@pytest.mark.parametrize(("form", "kernel"), FORMS)
def test_independent_rows_are_at_zero_only_when_debiased(form, kernel):
    rng = np.random.default_rng(0)
    layers = [torch.tensor(rng.normal(size=(600, d)), dtype=torch.float32) for d in (400, 300)]
    assert abs(cka_matrix(layers, kernel=kernel, form=form)[0, 1]) < 0.01
    assert cka_matrix(layers, kernel=kernel, form=form, estimator="biased")[0, 1] > 0.3


def test_bandwidth_is_a_fraction_of_the_median_distance():
    x = common(300)[0]
    median = math.sqrt(np.median(scipy.spatial.distance.pdist(x, "sqeuclidean")))
    assert reference.median_bandwidth(x) == pytest.approx(median, rel=1e-12)
    assert reference.median_bandwidth(torch.tensor(x), 0.4) == pytest.approx(0.4 * median, rel=1e-12)
    some = x[np.arange(50) * 6]
    assert reference.median_bandwidth(x, most=50) == pytest.approx(reference.median_bandwidth(some), rel=1e-12)
    assert reference.rbf_gram(x, 2.0)[0, 1] == pytest.approx(math.exp(-np.sum((x[0] - x[1]) ** 2) / 8), rel=1e-9)
    found = compare_layers([x * 2], kernel="rbf", form="panels")
    assert found.sigmas == [pytest.approx(2 * median)]
    given = [3.0, 5.0]
    layers = [torch.tensor(y, dtype=torch.float32) for y in common(400)[:2]]
    for form in ("naive", "panels"):
        cka = cka_matrix(layers, kernel="rbf", sigmas=given, form=form)
        assert np.abs(cka - naive(layers, "rbf", "debiased", given)[1]).max() < 5e-6


def test_scale_of_the_rows_is_undone():
    """HSIC of rows of any size, and no overflow of float32 on the way."""
    layers = data("benign", 400)
    for form in ("feature", "panels"):
        plain = hsic_matrix(layers, form=form)
        for factor in (1e-12, 3e14):
            scaled = hsic_matrix([x * factor for x in layers], form=form)
            assert np.abs(scaled / factor**4 / plain - 1).max() < 1e-5


def test_the_form_is_the_one_with_fewest_operations():
    d, depth = 576, 5
    cross = [(i, depth + j) for i in range(depth) for j in range(depth)]
    for n, form in (((depth + 1) * d - 1, Form.PANELS), ((depth + 1) * d, Form.FEATURE)):
        assert choose_form(n, [d] * 2 * depth, "linear", "cuda", cross) == form
    # A library's product does all of a symmetric self term.
    assert choose_form((depth + 1) * d, [d] * 2 * depth, "linear", "cpu", cross) == Form.PANELS
    assert choose_form((depth + 2) * d, [d] * 2 * depth, "linear", "cpu", [(j, i) for i, j in cross]) == Form.FEATURE
    assert choose_form(2 * depth * d, [d] * 2 * depth, "linear", "cuda") == Form.FEATURE
    assert choose_form(2 * depth * d - 1, [d] * 2 * depth, "linear", "cuda") == Form.PANELS
    assert choose_form(10**6, [8, 16], "rbf", "cpu") == Form.PANELS
    assert choose_form(NAIVE_ROWS, [8], "linear", "cpu") == Form.NAIVE
    assert choose_form(NAIVE_ROWS + 1, [8], "linear", "cpu") == Form.FEATURE
    with pytest.raises(FitError, match="no layers"):
        choose_form(10, [], "linear", "cpu")
    assert compare_layers(data("benign", 300)).form == Form.FEATURE
    assert compare_layers(data("benign", 300), kernel="rbf").form == Form.PANELS
    assert compare_layers(data("benign", 100)).form == Form.NAIVE


@pytest.mark.parametrize(("form", "kernel"), FORMS)
def test_only_what_is_wanted(form, kernel):
    layers = data("benign", 300)
    whole = hsic_matrix(layers, kernel=kernel, form=form)
    some = hsic_matrix(layers, kernel=kernel, form=form, wanted=[(2, 0)])
    asked = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=bool)
    assert np.isnan(some[~asked]).all()
    assert np.array_equal(some[asked], whole[asked])


@pytest.mark.parametrize(("form", "kernel"), FORMS)
@pytest.mark.parametrize("estimator", ["debiased", "biased"])
def test_rows_that_do_not_differ(form, kernel, estimator):
    layers = [*data("benign", 300)[:2], torch.full((300, 7), 0.1, dtype=torch.float64)]
    found = compare_layers(layers, kernel=kernel, form=form, estimator=estimator)
    assert found.reasons == {2: "its rows do not differ"}
    assert np.array_equal(found.hsic[2], np.zeros(3))
    cka = found.cka()
    assert np.isnan(cka[2]).all()
    assert np.isnan(cka[:, 2]).all()
    assert np.isfinite(cka[:2, :2]).all()


def test_no_bandwidth_where_most_rows_are_equal():
    x = torch.zeros(300, 5)
    x[:40] = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    layers = [x, data("benign", 300)[0]]
    for form in ("naive", "panels"):
        found = compare_layers(layers, kernel="rbf", form=form)
        assert "give one as sigma" in found.reasons[0]
        assert np.isnan(found.hsic[0]).all()
        assert math.isfinite(found.hsic[1, 1])
        given = compare_layers(layers, kernel="rbf", form=form, sigmas=[1.0, 9.0])
        assert given.reasons == {}
        assert np.isfinite(given.cka()).all()
    with pytest.raises(FitError, match="median distance between rows is 0"):
        reference.median_bandwidth(x)


def test_self_hsic_that_is_not_positive():
    """Four rows in one dimension where U-centring leaves nothing."""
    x = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    for form in ("naive", "feature", "panels"):
        found = compare_layers([x], form=form)
        assert found.reasons == {0: "its self-HSIC is not positive"}
        assert math.isnan(found.cka()[0, 0])


def test_what_is_malformed_is_refused():
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    broken = x.clone()
    broken[5, 1] = math.nan
    endless = x.clone()
    endless[2, 0] = math.inf
    refused = {
        "no layers": [],
        "layer 1 has 7 rows and layer 0 has 8": [x, x[:7]],
        "at least 4 rows, not 3": [x[:3]],
        "row 5 holds": [x, broken],
        "row 2 holds": [endless],
        r"shape \(8,\)": [x[:, 0]],
        r"shape \(8, 0\)": [x[:, :0]],
        "int64": [x.long()],
        "on meta and layer 0 on cpu": [x, x.to("meta")],
    }
    for message, layers in refused.items():
        with pytest.raises(FitError, match=message):
            cka_matrix(layers)
    options = {
        "no kernel 'cosine'": {"kernel": "cosine"},
        "no estimator 'exact'": {"estimator": "exact"},
        "no form 'fast': naive, feature, panels": {"form": "fast"},
        "no feature space": {"kernel": "rbf", "form": "feature"},
        "for the rbf kernel": {"sigmas": [1.0]},
        "2 bandwidths for 1 layers": {"kernel": "rbf", "sigmas": [1.0, 1.0]},
        "a bandwidth of -1.0": {"kernel": "rbf", "sigmas": [-1.0]},
        r"layers \(0, 1\) of 1": {"wanted": [(0, 1)]},
        "no back end 'cuda'": {"backend": "cuda", "form": "panels"},
    }
    for message, given in options.items():
        with pytest.raises(FitError, match=message):
            cka_matrix([x], **given)
    with pytest.raises(MissingPackageError, match="sm_80"):
        cka_matrix([x], form="panels", backend="triton")
    with pytest.raises(FitError, match="at most float32"):
        cka_matrix([x.double()], form="panels", backend="triton")
    with pytest.raises(FitError, match="fraction above 0"):
        reference.median_bandwidth(x, 0.0)
    with pytest.raises(FitError, match="at least 2 rows"):
        reference.median_bandwidth(x[:1])
    assert math.isnan(reference.hsic1(np.eye(3), np.eye(3)))


def test_arrays_that_may_not_be_written():
    x = common(300)[0].astype(np.float32)
    x.flags.writeable = False
    before = x.tobytes()
    assert cka_matrix([x, x])[0, 1] == pytest.approx(1, abs=1e-6)
    assert x.tobytes() == before


def test_centred_rows():
    x = data("mean of 10 sigma", 300)[0] * 1000
    full = centre(x)
    assert math.log2(full.scale).is_integer()
    assert 0.5 < full.rows.std() < 2
    # The mean that is subtracted and each difference are off by at most half a unit in the last place of float32.
    mean = x.mean(0, dtype=torch.float64).abs() * full.scale
    assert (full.rows.double().mean(0).abs() <= 2.0**-24 * (mean + full.rows.double().abs().mean(0))).all()
    torch.testing.assert_close(full.norms, full.rows.double().square().sum(1), rtol=1e-14, atol=0)
    narrow = centre(x, "tensor")
    assert torch.equal(narrow.rows, round_to_tf32(full.rows))
    torch.testing.assert_close(narrow.norms, narrow.rows.double().square().sum(1), rtol=1e-14, atol=0)
    assert centre(x.to(torch.bfloat16), "tensor").rows.dtype == torch.bfloat16
    equal = centre(1 + 2.0**-52 * (torch.arange(600, dtype=torch.float64) % 2).view(200, 3))
    assert not equal.varies
    assert not equal.rows.any()
    assert not equal.norms.any()
    spiked = torch.zeros(5000, 1000, dtype=torch.float16)
    spiked[8, 3] = 6e4
    assert centre(spiked, "tensor").rows.dtype == torch.float32


def test_round_to_tf32():
    x = torch.tensor([1.0, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-20, -(1 + 2**-12), 3e38])
    expected = torch.tensor([1.0, 1.0, 1 + 2**-9, 1 + 2**-10, -1.0])
    assert torch.equal(round_to_tf32(x)[:5], expected)
    assert torch.equal(round_to_tf32(round_to_tf32(x)), round_to_tf32(x))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (300, 700), (2048, 2048), (1000, 129)])
def test_tiles_cover_everything_once(rows, columns):
    for upper in (False, True):
        order = tile_order(rows, columns, upper=upper)
        covered = np.zeros((rows, columns), dtype=int)
        for i, j in order:
            covered[i * BM : (i + 1) * BM, j * BN : (j + 1) * BN] += 1
            assert not upper or (j + 1) * BN > i * BM
        wanted = np.triu(np.ones_like(covered)) if upper else np.ones_like(covered)
        assert (covered[wanted == 1] == 1).all()
        assert order.dtype == np.int32


def test_panels_fit_their_memory():
    for n, layers, device in ((300, 2, "cpu"), (10**5, 5, "cpu"), (10**5, 66, "cpu"), (10**5, 66, "cuda")):
        size = panel_size(n, layers, device)
        assert size % 256 == 0
        assert size >= 256
        assert layers * size**2 * 4 <= {"cpu": 2**28, "cuda": 2**31}[device]
    assert panel_size(300, 2, "cpu") == 512
    assert panel_size(10**6, 1000, "cpu") == 256


def test_importing_needs_neither_triton_nor_cuda():
    code = """
import sys
sys.modules["triton"] = None
import torch
from align.kernels.api import cka_matrix
from align.kernels import autograd
from align.kernels.triton import compile
print(cka_matrix([torch.arange(900.0).sin().view(300, 3)], form="panels")[0, 0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(1)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["-k", "sinks or padded"], id="some"),
        pytest.param([], id="all", marks=pytest.mark.thorough),
    ],
)
def test_the_kernels_in_the_interpreter(words):
    """TRITON_INTERPRET must not reach the other tests, so the kernels' own tests run in a process of their own."""
    path = Path(__file__).with_name("test_kernels_triton.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path), *words],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "passed" in done.stdout


@pytest.mark.parametrize("sizes", [(300, 40, 7, 1, 1, 200, 151), (1,) * 700, (350, 350), (500, 200)])
@pytest.mark.parametrize(("form", "kernel"), FORMS)
def test_pairs_within_documents_are_left_out(form, kernel, sizes):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    n = 700 if form != "naive" else 60
    layers, labels = [x[:n] for x in data("benign", 700)], labels[:n]
    found = compare_layers(layers, kernel=kernel, form=form, documents=torch.from_numpy(labels))
    sigmas = found.sigmas or [None] * 3
    grams = [reference.gram(x.double().numpy(), kernel, s) for x, s in zip(layers, sigmas, strict=True)]
    for i, k in enumerate(grams):
        for j, m in enumerate(grams):
            assert found.cka()[i, j] == pytest.approx(cosine_of_kernels(k, m, labels), abs=TOLERANCE[kernel])
    if len(sizes) == 700:
        usual = compare_layers(layers, kernel=kernel, form=form)
        np.testing.assert_allclose(found.hsic, usual.hsic, rtol=1e-5)
    again = compare_layers(layers, kernel=kernel, form=form, documents=labels)
    assert found.hsic.tobytes() == again.hsic.tobytes()


@pytest.mark.parametrize("form", ["naive", "feature", "panels"])
def test_documents_that_leave_nothing(form):
    layers = data("benign", 40)
    found = compare_layers(layers, form=form, documents=np.zeros(40))
    assert np.isnan(found.cka()).all()
    assert all("all 40 are of one" in found.reasons[k] for k in range(3))
    with pytest.raises(FitError, match="39 document labels for 40 rows"):
        compare_layers(layers, form=form, documents=np.zeros(39))
    with pytest.raises(FitError, match="are for the estimator 'debiased'"):
        compare_layers(layers, form=form, estimator="biased", documents=np.arange(40))
