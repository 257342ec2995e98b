"""Kernels without row effects by a generic least-squares solver, and rows that share topics: what debiased CKA is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def without_row_effects(kernel: Any, documents: Any) -> Any:
    """Residuals of K_ij = a_i + a_j over the pairs of rows of different documents, zero within documents.

    The design itself where it is small; of more rows its normal equations, whose matrix is dense.
    """
    labels, n = np.asarray(documents), len(kernel)
    between = labels[:, None] != labels[None, :]
    if n <= 60:
        i, j = np.nonzero(between)
        design = np.eye(n)[i] + np.eye(n)[j]
        effects = np.linalg.lstsq(design, kernel[i, j], rcond=None)[0]
    else:
        normal = np.diag(between.sum(axis=1)) + between
        effects = np.linalg.lstsq(normal, np.where(between, kernel, 0).sum(axis=1), rcond=None)[0]
    return np.where(between, kernel - effects[:, None] - effects, 0)


def cosine_of_kernels(k: Any, m: Any, documents: Any) -> float:
    """Debiased CKA of two kernel matrices."""
    a, b = (without_row_effects(kernel, documents) for kernel in (k, m))
    return float(np.sum(a * b) / math.sqrt(np.sum(a * a) * np.sum(b * b)))


def unequal_documents(rng: Any, documents: int, *, median: float = 40.0) -> Any:
    """Labels of documents of lognormal lengths, one document after another."""
    return np.repeat(np.arange(documents), np.maximum(5, rng.lognormal(math.log(median), 0.6, documents).astype(int)))


def with_topics(rng: Any, labels: Any, width: int, share: float) -> Any:
    """Rows of which a share of the variance is their document's, with a spectrum that falls off."""
    topics = math.sqrt(share) * rng.standard_normal((int(np.max(labels)) + 1, width))[labels]
    rows = topics + math.sqrt(1 - share) * rng.standard_normal((len(labels), width))
    return rows * np.arange(1, width + 1) ** -0.5
