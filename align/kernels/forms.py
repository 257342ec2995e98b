"""Which of the ways to compute HSIC between layers costs least."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from align.kernels.reference import Kernel, check_names
from featstore.errors import FitError

#: Up to here the float64 formula over n x n matrices takes no time worth saving.
NAIVE_ROWS = 256


class Form(StrEnum):
    """How HSIC between layers is computed.

    Attributes:
        NAIVE: Gram matrices of n x n in float64.
        FEATURE: From |X'Y|_F^2 and row norms; linear kernel only.
        PANELS: From the Gram matrices, one macro-tile of all layers at a time.
    """

    NAIVE = "naive"
    FEATURE = "feature"
    PANELS = "panels"


def all_pairs(layers: int) -> list[tuple[int, int]]:
    """Every two layers and every layer with itself, the first at most the second.

    Args:
        layers: Number of layers.
    """
    return [(i, j) for i in range(layers) for j in range(i, layers)]


def feature_flops(n: int, widths: Sequence[int], device: str, pairs: Sequence[tuple[int, int]]) -> int:
    """Operations in feature space: 2 n d_i d_j a pair.

    A self term is symmetric: the CUDA kernel does half of it, a library's product on the CPU all of it.

    Args:
        n: Rows.
        widths: Width of each layer.
        device: ``cpu``, ``cuda``.
        pairs: Layers to compare; self terms are always needed and counted once.
    """
    own = n if device == "cuda" else 2 * n
    cross = sum(2 * n * widths[i] * widths[j] for i, j in set(pairs) if i != j)
    return cross + sum(own * d * d for d in widths)


def panel_flops(n: int, widths: Sequence[int]) -> int:
    """Operations in sample space: n^2 d a layer, each Gram matrix once and above the diagonal only.

    Args:
        n: Rows.
        widths: Width of each layer.
    """
    return sum(n * n * d for d in widths)


def choose_form(
    n: int, widths: Sequence[int], kernel: Kernel, device: str, wanted: Sequence[tuple[int, int]] | None = None
) -> Form:
    """The form with the fewest operations.

    For the L x L matrix across two models of equal width d on CUDA, feature space takes (2 L^2 + 2 L) n d^2 operations
    and panels 2 L n^2 d, so they break even at n = (L + 1) d. Multiplying the panels with each other is left out: it is
    L / d of the whole.

    Args:
        n: Rows.
        widths: Width of each layer.
        kernel: ``linear`` or ``rbf``; there is no feature space of finite width for the latter.
        device: ``cpu``, ``cuda``.
        wanted: Pairs of layers; all when None.

    Raises:
        FitError: No such kernel, or no layers.
    """
    check_names(kernel, "debiased")
    if not widths:
        raise FitError("no layers to compare: give at least one")
    if n <= NAIVE_ROWS:
        return Form.NAIVE
    if kernel == "rbf":
        return Form.PANELS
    pairs = all_pairs(len(widths)) if wanted is None else [(min(p), max(p)) for p in wanted]
    feature = feature_flops(n, widths, device, pairs)
    return Form.FEATURE if feature <= panel_flops(n, widths) else Form.PANELS
