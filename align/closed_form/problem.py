"""What a closed form is solved from, and what is computed only once for all layer pairs of one source."""

from __future__ import annotations

from dataclasses import dataclass

from align import solvers
from align.moments.scatter import Array, Scatter
from align.solvers.linalg import matrix
from align.solvers.polar import polar


@dataclass(eq=False)
class Source:
    """What is known of the source layers that were fitted last.

    Attributes:
        facts: By which they are recognised.
        rotated: A layer pair in their eigenbasis; None before there is one.
        spectrum: Their eigendecomposition, or None.
        values: (d,) eigenvalues of their Gram on the host, or None.
        moved: The moments that were brought to a device last, train and validation, and there; or None.
        turned: The cross-moments whose polar factor was asked for last, and that factor with its trace; or None.
    """

    facts: tuple[object, ...]
    rotated: solvers.Rotated | None = None
    spectrum: solvers.Spectrum | None = None
    values: Array | None = None
    moved: tuple[Scatter, Scatter, Scatter, Scatter] | None = None
    turned: tuple[Array, tuple[Array, float]] | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """The moments of one layer pair, on the device where its map is solved for.

    Attributes:
        train: Moments of the train rows, about their means for a centred type and about zero for another.
        val: Moments of the validation rows about the same points; lambda and components are chosen on them.
        source: What other layer pairs of the same source have left.
    """

    train: Scatter
    val: Scatter
    source: Source

    @property
    def widths(self) -> tuple[int, int]:
        """Width of the source and of the target."""
        dx, dy = self.train.c.shape
        return int(dx), int(dy)

    def rotated(self) -> solvers.Rotated:
        """Both moments in the eigenbasis of the source, the most expensive part of a ridge path."""
        known = self.source.rotated
        if known is not None and known.train is self.train and known.val is self.val:
            return known
        self.source.rotated = solvers.rotate(
            self.train, self.val, spectrum=self.source.spectrum, like=self.source.rotated
        )
        self.source.spectrum = self.source.rotated.spectrum
        return self.source.rotated

    def turned(self) -> tuple[Array, float]:
        """The polar factor of the cross-moments and its trace: rotations, and maps on top of one, share it."""
        known = self.source.turned
        if known is None or known[0] is not self.train.c:
            known = self.source.turned = self.train.c, polar(matrix("cxy", self.train.c))
        return known[1]

    def spectrum(self) -> solvers.Spectrum:
        """The eigendecomposition of the source's Gram matrix."""
        if self.source.spectrum is None:
            self.source.spectrum = solvers.Spectrum.of(self.train.gx, self.train.unit)
        return self.source.spectrum


@dataclass(frozen=True, eq=False)
class Solution:
    """A map that was solved for.

    Attributes:
        weight: float64 ``(d_source, d_target)`` on the host.
        options: What was chosen, as the card has it.
        trainable: Parameters that were fitted.
    """

    weight: Array
    options: dict[str, float | int | str]
    trainable: int
