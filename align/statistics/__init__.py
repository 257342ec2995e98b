"""How sure a figure over documents is: intervals, tests and verdicts, over arrays alone."""

from align.statistics.linearised import (
    FEWEST,
    FEWEST_EFFECTIVE,
    LEVEL,
    SIGNIFICANT,
    Estimate,
    Linearised,
    mean,
    quotient,
    ratio,
)
from align.statistics.multiple import holm, permutation_p
from align.statistics.paired import Paired, paired_proportions
from align.statistics.verdict import CONTRADICTED, SUPPORTED, UNDECIDED, Verdict, judge

__all__ = [
    "CONTRADICTED",
    "FEWEST",
    "FEWEST_EFFECTIVE",
    "LEVEL",
    "SIGNIFICANT",
    "SUPPORTED",
    "UNDECIDED",
    "Estimate",
    "Linearised",
    "Paired",
    "Verdict",
    "holm",
    "judge",
    "mean",
    "paired_proportions",
    "permutation_p",
    "quotient",
    "ratio",
]
