"""What each measure is, in a sentence, and where it comes from."""

from __future__ import annotations

from typing import NamedTuple

from align.similarity.floors.reading import NAMES


class Definition(NamedTuple):
    """A measure in words.

    Attributes:
        title: As a heading names it.
        says: One sentence.
        source: The paper.
    """

    title: str
    says: str
    source: str


MEASURES: dict[str, Definition] = {
    "cka": Definition(
        "Linear CKA",
        "How far two layers find the same pairs of tokens alike: the inner products of all pairs of rows are compared, "
        "scaled so that 1 means equal up to rotation, shift and one common factor. Debiased, pairs of rows of one "
        "document do not count.",
        "Kornblith et al. 2019, arXiv 1905.00414; with a document a row, HSIC_1 of Song et al. 2012 (JMLR 13)",
    ),
    "rbf-cka": Definition(
        "RBF CKA",
        "CKA with a Gaussian kernel, whose bandwidth follows the layer's own distances: near rows count, far ones do "
        "not.",
        "Kornblith et al. 2019, arXiv 1905.00414",
    ),
    "rsa": Definition(
        "RSA",
        "The correlation, over all pairs of rows, of the two layers' dissimilarities: 1 minus the correlation of two "
        "rows.",
        "Kriegeskorte et al. 2008, Front. Syst. Neurosci. 2:4",
    ),
    "mutual-knn": Definition(
        "Mutual k-NN",
        "The share of a row's k nearest neighbours in one layer that are its nearest neighbours in the other, too.",
        "Huh et al. 2024, arXiv 2405.07987",
    ),
    "cknna": Definition(
        "CKNNA",
        "CKA restricted to pairs of rows that are nearest neighbours in both layers: local like mutual k-NN, graded "
        "like CKA.",
        "Huh et al. 2024, arXiv 2405.07987",
    ),
    "svcca": Definition(
        "SVCCA",
        "The mean canonical correlation between the leading principal components of the two layers.",
        "Raghu et al. 2017, arXiv 1706.05806",
    ),
    "pwcca": Definition(
        "PWCCA",
        "Canonical correlations weighted by how much of the first layer each of them accounts for; not the same both "
        "ways round.",
        "Morcos et al. 2018, arXiv 1806.05759",
    ),
    "procrustes-distance": Definition(
        "Procrustes distance",
        "The root mean square distance of paired rows after the best rotation; sizes count, and 0 means equal up to "
        "rotation and shift.",
        "Williams et al. 2021, arXiv 2110.14739",
    ),
    "angular-distance": Definition(
        "Angular distance",
        "The angle between the two layers as shapes after the best rotation, from 0 to \u03c0/2; sizes do not count.",
        "Williams et al. 2021, arXiv 2110.14739",
    ),
    "ridge-r2": Definition(
        "Ridge R\u00b2",
        "The share of one layer's variance that a ridge regression from the other predicts on documents it has not "
        "seen; not the same both ways round.",
        "Hoerl and Kennard 1970 (Technometrics 12:55)",
    ),
}

#: Where there is less to find, or nothing.
FLOORS = {
    **NAMES,
    "shuffled": "rows shuffled",
    "noise": "noise of the same covariance",
}
#: Where all is found.
CEILINGS = {
    "rounding": "rounded as stored",
    "halves": "halves differ by",
    "twice": "computed twice",
}


def title_of(name: str) -> str:
    """A measure's title; its name where it is not known here.

    Args:
        name: Such as ``mutual-knn``.
    """
    return MEASURES[name].title if name in MEASURES else name
