"""Every measure over rows, by the name it is typed with."""

from __future__ import annotations

from collections.abc import Callable

from align.similarity.measures.base import Measure
from align.similarity.measures.kernel_cka import Cka, RbfCka
from align.similarity.measures.names import MEASURES
from align.similarity.measures.neighbours import Cknna, MutualKnn
from align.similarity.measures.predictability import RidgeR2
from align.similarity.measures.rsa import Rsa
from align.similarity.measures.shape import angular_distance, procrustes_distance
from align.similarity.measures.subspace import pwcca, svcca
from featstore.errors import SpecError

_MAKERS: dict[str, Callable[[], Measure]] = {
    "cka": Cka,
    "rbf-cka": RbfCka,
    "rsa": Rsa,
    "mutual-knn": MutualKnn,
    "cknna": Cknna,
    "svcca": svcca,
    "pwcca": pwcca,
    "procrustes-distance": procrustes_distance,
    "angular-distance": angular_distance,
    "ridge-r2": RidgeR2,
}


def parse_measures(text: str) -> list[Measure]:
    """What ``--measures`` means.

    Args:
        text: Names with commas between, ``all`` or ``none``.

    Raises:
        SpecError: An unknown name, or one twice.
    """
    names = [name.strip() for name in text.split(",")]
    if names == ["none"]:
        return []
    if names == ["all"]:
        names = list(MEASURES)
    for name in names:
        if name not in _MAKERS:
            raise SpecError(f"--measures {text!r}: {name!r} is none of {', '.join(MEASURES)}, all, none")
    if len(set(names)) < len(names):
        raise SpecError(f"--measures {text!r}: a measure stands there twice; name every measure once")
    return [_MAKERS[name]() for name in names]
