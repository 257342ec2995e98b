"""The names of measures; free of everything they need."""

from __future__ import annotations

#: As ``--measures`` takes them.
MEASURES = (
    *("cka", "rbf-cka", "rsa", "mutual-knn", "cknna"),
    *("svcca", "pwcca", "procrustes-distance", "angular-distance", "ridge-r2"),
)
