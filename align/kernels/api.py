"""HSIC and CKA between all layers, by whichever form costs least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from align.kernels import reference
from align.kernels.blocks import BLOCK_ROWS, feature_sums
from align.kernels.centre import Centred, centre, check_layers
from align.kernels.documents import shared_of, within
from align.kernels.forms import Form, all_pairs, choose_form
from align.kernels.panels import panel_sums
from align.kernels.reference import Estimator, Kernel, check_names, median_bandwidth
from align.kernels.triton.launch import Path, cross_square, triton_path
from align.solvers.row_effects import Documents, in_order
from featstore.errors import FitError, MissingPackageError

Array = NDArray[np.float64]
Backend = Literal["auto", "triton", "torch"]
#: Rows over which products are summed in float32 on a GPU.
FLOAT32_ROWS = 65536
#: A self-HSIC below this share of the terms it is the difference of is their rounding.
_ROUNDING = {True: 1e-12, False: float(np.finfo(np.float32).eps)}


@dataclass(frozen=True, eq=False)
class LayerSimilarity:
    """HSIC between layers and what it took.

    Attributes:
        hsic: float64 ``(layers, layers)``, symmetric; NaN where not asked for or undefined.
        reasons: Position of a layer to why its CKA is undefined.
        sigmas: Bandwidths used; None for the linear kernel.
        form: How it was computed.
        backend: ``triton`` or ``torch``.
    """

    hsic: Array
    reasons: dict[int, str]
    sigmas: list[float] | None
    form: Form
    backend: str

    def cka(self) -> Array:
        """HSIC / sqrt(HSIC HSIC) of every two layers, never clamped; NaN in the row and column of a layer in reasons.

        Returns:
            float64 ``(layers, layers)``.
        """
        own = np.diag(self.hsic).copy()
        own[list(self.reasons)] = math.nan
        root = np.sqrt(own)
        # One product of roots for both places: dividing one after the other would round them differently.
        return np.asarray(self.hsic / (root[:, None] * root[None, :]))


def _tensor(x: Any) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        if x.layout is not torch.strided:
            raise FitError(f"a layer is a {x.layout} tensor: give dense rows (n, d)")
        return x
    try:
        array = np.asarray(x)
        # torch warns of arrays that it could write to and must not.
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError) as error:
        raise FitError("a layer is no array of numbers: give float32, float16, bfloat16 or float64 rows") from error


def _bandwidths(layers: list[torch.Tensor], kernel: Kernel, sigmas: Sequence[float] | None) -> list[float] | None:
    """One bandwidth a layer, NaN where its median distance gives none; None for the linear kernel."""
    if kernel == "linear":
        if sigmas is not None:
            raise FitError("bandwidths are for the rbf kernel; leave sigmas out for the linear one")
        return None
    if sigmas is None:
        found = []
        for x in layers:
            try:
                found.append(median_bandwidth(x))
            except FitError:
                found.append(math.nan)
        return found
    given = [float(s) for s in sigmas]
    if len(given) != len(layers):
        raise FitError(f"{len(given)} bandwidths for {len(layers)} layers: give one for each")
    for s in given:
        if not (math.isfinite(s) and s > 0):
            raise FitError(f"a bandwidth of {s}: give one above 0")
    return given


def _path(backend: Backend, device: torch.device, layers: Sequence[torch.Tensor]) -> Path | None:
    if backend not in ("auto", "triton", "torch"):
        raise FitError(f"no back end {backend!r}: auto, triton or torch")
    if backend == "torch":
        return None
    wide = _any_wide(layers)
    path = None if wide else triton_path(device)
    if backend == "triton" and path is None:
        if wide:
            raise FitError("the kernels multiply at most float32: give narrower rows, or backend='torch'")
        if device.type == "cpu" and _interpreted():
            return "descriptors"
        raise MissingPackageError(
            f"the kernels need triton and a CUDA device of sm_80 or later, not {device}; choose backend='torch' here"
        )
    return path


def _interpreted() -> bool:
    """Whether triton runs its kernels as Python, on tensors of the CPU."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def _any_wide(rows: Sequence[torch.Tensor]) -> bool:
    """Whether products would have to be float64."""
    return any(x.dtype == torch.float64 for x in rows)


def _fro(x: torch.Tensor, y: torch.Tensor, path: Path | None) -> torch.Tensor:
    """|X'Y|_F^2, float64."""
    if path is not None and len(x) <= FLOAT32_ROWS and x.dtype == y.dtype:
        return cross_square(x, y, path)
    rows = FLOAT32_ROWS if x.device.type == "cuda" else BLOCK_ROWS
    blocks = zip(x.split(rows), y.split(rows), strict=True)
    wide = torch.promote_types(x.dtype, y.dtype)
    wide = wide if wide == torch.float64 else torch.float32
    c = sum(((a.to(wide).T @ b.to(wide)).to(torch.float64) for a, b in blocks), start=torch.zeros((), device=x.device))
    return c.square_().sum()


def _feature(
    layers: list[Centred],
    pairs: list[tuple[int, int]],
    estimator: Estimator,
    path: Path | None,
    documents: Documents | None,
) -> tuple[Array, Array]:
    """HSIC from cross-covariances: |C|_F^2 for the biased one, and with row norms for the unbiased (Song et al. 2012).

    [ |C|_F^2 - n/(n-2) sum_i a_i b_i + (sum a)(sum b) / ((n-1)(n-2)) ] / (n(n-3)) for centred rows.
    """
    count = len(layers)
    fro = np.full((count, count), math.nan)
    for i, j in pairs:
        fro[i, j] = fro[j, i] = float(_fro(layers[i].rows, layers[j].rows, path))
    if documents is not None:
        own, rows = within(layers, documents)
        shared, taken = shared_of(-rows, documents).cpu().numpy(), own.cpu().numpy()
        size = np.diag(fro + taken + 2 * np.abs(shared)) / documents.freedom
        return (fro - taken - 2 * shared) / documents.freedom, size
    return _of_all_rows(fro, torch.stack([x.norms for x in layers]), estimator)


def _of_all_rows(fro: Array, norms: torch.Tensor, estimator: Estimator) -> tuple[Array, Array]:
    """HSIC where each row is its own document, from what :func:`_feature` adds up; and the size of its terms."""
    n = norms.shape[1]
    if estimator == "biased":
        return fro / (n - 1) ** 2, np.diag(fro) / (n - 1) ** 2
    total = norms.sum(1).cpu().numpy()
    diagonal = n / (n - 2) * (norms @ norms.T).cpu().numpy()
    product = np.outer(total, total) / ((n - 1) * (n - 2))
    return (fro - diagonal + product) / (n * (n - 3)), np.diag(fro + diagonal + product) / (n * (n - 3))


def _naive(
    layers: list[torch.Tensor],
    pairs: list[tuple[int, int]],
    kernel: Kernel,
    estimator: Estimator,
    sigmas: list[float] | None,
    documents: Documents | None,
) -> tuple[Array, Array]:
    grams = [
        reference.gram(x.detach().to(device="cpu", dtype=torch.float64).numpy(), kernel, None if sigmas is None else s)
        for x, s in zip(layers, sigmas or [math.nan] * len(layers), strict=True)
    ]
    found = np.full((len(layers), len(layers)), math.nan)
    if documents is not None:
        labels = np.repeat(np.arange(len(documents.sizes)), documents.sizes)
        residuals = [reference.without_row_effects(g, labels) for g in grams]
    for i, j in pairs:
        if documents is None:
            value = reference.hsic(grams[i], grams[j], estimator)
        else:
            value = reference.hsic_of_residuals(residuals[i], residuals[j], documents)
        found[i, j] = found[j, i] = value
    return found, np.array([float(np.sum(g * g)) / len(g) ** 2 for g in grams])


def compare_layers(
    layers: Sequence[Any],
    *,
    kernel: Kernel = "linear",
    estimator: Estimator = "debiased",
    sigmas: Sequence[float] | None = None,
    wanted: Sequence[tuple[int, int]] | None = None,
    documents: Any = None,
    form: Form | str | None = None,
    backend: Backend = "auto",
) -> LayerSimilarity:
    """HSIC between layers, with what CKA needs and why it is undefined where it is.

    Rows are centred in float64 first. Products are float32 (on a GPU: bfloat16, float16 or tf32, as the rows are) and
    sums float64; without a GPU the error against float64 is within 1e-6 (linear) and 5e-6 (RBF), with one within 1e-5.
    Reruns give the same bits.

    Args:
        layers: Tensors or arrays ``(n, d)``, of any widths, float32, float16, bfloat16 or float64, on one device, rows
            paired.
        kernel: ``linear`` or ``rbf``; see :mod:`align.kernels.reference` for the bandwidth.
        estimator: ``debiased`` (HSIC_1) or ``biased`` (HSIC_0).
        sigmas: Bandwidths, one a layer; each layer's median distance when None.
        wanted: Pairs of positions; all when None. Self terms are computed either way.
        documents: int64 ``(n,)`` labels, an array or a tensor: pairs of rows of one document are left out, and row
            effects fitted on the others (:mod:`align.solvers.row_effects`). Rows of a document need not follow each
            other. Of ``debiased`` alone; None for every row its own document.
        form: ``naive``, ``feature`` or ``panels``; :func:`choose_form` when None.
        backend: ``triton``, ``torch``, or whichever the device allows.

    Raises:
        FitError: Layers, bandwidths, pairs, documents or names that are not as above, or rows that are not finite.
        MissingPackageError: Triton was asked for where it cannot run.
    """
    check_names(kernel, estimator)
    rows = [_tensor(x) for x in layers]
    check_layers(rows)
    rows, blocks = _in_order(rows, documents, estimator)
    count, n, device = len(rows), len(rows[0]), rows[0].device
    for pair in wanted or ():
        if len(pair) != 2 or not all(0 <= p < count for p in pair):
            raise FitError(f"layers {tuple(pair)} of {count}: give two positions from 0 to {count - 1}")
    pairs = all_pairs(count)
    if wanted is not None:
        pairs = sorted({(min(p), max(p)) for p in wanted} | {(i, i) for i in range(count)})
    chosen = choose_form(n, [x.shape[1] for x in rows], kernel, device.type, wanted) if form is None else _form(form)
    if chosen == Form.FEATURE and kernel == "rbf":
        raise FitError("the rbf kernel has no feature space of finite width: form 'panels' or 'naive'")
    path = None if chosen == Form.NAIVE else _path(backend, device, rows)
    used = _bandwidths(rows, kernel, sigmas)
    ready, sums = [], None
    if chosen == Form.FEATURE and blocks is None and device.type == "cpu" and path is None and not _any_wide(rows):
        sums = feature_sums(rows, pairs)
        varies, scales = sums.varies, sums.scales
    else:
        ready = [centre(x, "full" if path is None else "tensor") for x in rows]
        varies, scales = [x.varies for x in ready], np.array([x.scale for x in ready])
    reasons = {k: "its rows do not differ" for k in range(count) if not varies[k]}
    if blocks is not None and (undefined := blocks.reason):
        nothing = np.full((count, count), math.nan)
        backend_used = "torch" if path is None else "triton"
        return LayerSimilarity(nothing, dict.fromkeys(range(count), undefined), used, chosen, backend_used)
    for k, sigma in enumerate(used or ()):
        if math.isnan(sigma) and k not in reasons:
            reasons[k] = "the median distance between its rows is 0, which gives no bandwidth; give one as sigma"
    usable = None if used is None else [1.0 if math.isnan(s) else s for s in used]
    if chosen == Form.NAIVE:
        held = [x if different else torch.zeros_like(x) for x, different in zip(rows, varies, strict=True)]
        hsic, size = _naive(held, pairs, kernel, estimator, usable, blocks)
    else:
        if sums is not None:
            hsic, size = _of_all_rows(sums.fro, torch.from_numpy(sums.norms), estimator)
        elif chosen == Form.FEATURE:
            hsic, size = _feature(ready, pairs, estimator, path, blocks)
        else:
            scaled = None if usable is None else [s * x.scale for s, x in zip(usable, ready, strict=True)]
            found, sizes = panel_sums(ready, scaled, documents=blocks, path=path).hsic(estimator)
            hsic, size = found.cpu().numpy(), sizes.cpu().numpy()
            hsic = (hsic + hsic.T) / 2
            asked = np.zeros_like(hsic, dtype=bool)
            for i, j in pairs:
                asked[i, j] = asked[j, i] = True
            hsic[~asked] = math.nan
        if kernel == "linear":
            hsic, size = hsic / np.outer(scales**2, scales**2), size / scales**4
    rounding = _ROUNDING[chosen == Form.NAIVE or all(x.dtype == torch.float64 for x in rows)]
    for k in range(count):
        if k in reasons:
            # Of equal rows every centred Gram matrix is 0; a bandwidth that is missing leaves nothing to say.
            unknown = math.nan if varies[k] else 0.0
            hsic[k, :] = hsic[:, k] = np.where(np.isnan(hsic[k]), math.nan, unknown)
        elif not hsic[k, k] > rounding * size[k]:
            reasons[k] = "its self-HSIC is not positive"
    return LayerSimilarity(hsic, reasons, used, chosen, "torch" if path is None else "triton")


def _in_order(
    rows: list[torch.Tensor], documents: Any, estimator: Estimator
) -> tuple[list[torch.Tensor], Documents | None]:
    """Rows in the order of their documents, and these; as they are where there are none."""
    if documents is None:
        return rows, None
    if estimator != "debiased":
        raise FitError(f"documents are for the estimator 'debiased', not {estimator!r}; leave them out")
    order, found = in_order(documents.cpu().numpy() if isinstance(documents, torch.Tensor) else documents)
    if found.n != len(rows[0]):
        raise FitError(f"{found.n} document labels for {len(rows[0])} rows: give one for each row")
    if (np.diff(order) == 1).all():
        return rows, found
    places = torch.from_numpy(order).to(rows[0].device)
    return [x[places] for x in rows], found


def _form(form: Form | str) -> Form:
    try:
        return Form(form)
    except ValueError:
        raise FitError(f"no form {str(form)!r}: {', '.join(Form)}") from None


def hsic_matrix(
    layers: Sequence[Any],
    *,
    kernel: Kernel = "linear",
    estimator: Estimator = "debiased",
    sigmas: Sequence[float] | None = None,
    wanted: Sequence[tuple[int, int]] | None = None,
    documents: Any = None,
    form: Form | str | None = None,
    backend: Backend = "auto",
) -> Array:
    """HSIC between all layers.

    Arguments and errors are those of :func:`compare_layers`.

    Returns:
        float64 ``(layers, layers)``.
    """
    return compare_layers(
        layers,
        kernel=kernel,
        estimator=estimator,
        sigmas=sigmas,
        wanted=wanted,
        documents=documents,
        form=form,
        backend=backend,
    ).hsic


def cka_matrix(
    layers: Sequence[Any],
    *,
    kernel: Kernel = "linear",
    estimator: Estimator = "debiased",
    sigmas: Sequence[float] | None = None,
    wanted: Sequence[tuple[int, int]] | None = None,
    documents: Any = None,
    form: Form | str | None = None,
    backend: Backend = "auto",
) -> Array:
    """CKA between all layers, never clamped.

    Arguments and errors are those of :func:`compare_layers`.

    Returns:
        float64 ``(layers, layers)``; NaN where undefined, for which ``compare_layers(...).reasons`` has the reason.
    """
    return compare_layers(
        layers,
        kernel=kernel,
        estimator=estimator,
        sigmas=sigmas,
        wanted=wanted,
        documents=documents,
        form=form,
        backend=backend,
    ).cka()
