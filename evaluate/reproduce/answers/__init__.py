"""The programme's questions, each answered from the evidence by one function."""

from __future__ import annotations

from collections.abc import Callable

from evaluate.reproduce.answers.base import Answer
from evaluate.reproduce.answers.maps import (
    affine_beats_procrustes,
    bias_and_rank,
    lora_keeps,
    multi_layer,
    which_layers,
)
from evaluate.reproduce.answers.models import ceiling, controls, rates
from evaluate.reproduce.answers.tasks import communication
from evaluate.reproduce.answers.training import epochs, gradient, in_the_model
from evaluate.reproduce.evidence import Evidence

#: In the order in which they are read.
QUESTIONS: tuple[Callable[[Evidence], Answer], ...] = (
    ceiling,
    epochs,
    in_the_model,
    gradient,
    which_layers,
    multi_layer,
    lora_keeps,
    affine_beats_procrustes,
    bias_and_rank,
    controls,
    communication,
    rates,
)


def answer_all(evidence: Evidence) -> list[Answer]:
    """Answer every question.

    Args:
        evidence: Of the programme's directory.
    """
    return [question(evidence) for question in QUESTIONS]
