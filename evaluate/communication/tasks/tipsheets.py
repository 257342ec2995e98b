"""*tipsheets*: a note on two companies; which of the two to choose?

One company's signals are good, the other's are not; the choice between them is balanced in order and in position.
After "Communicating Activations Between Language Model Agents" (arXiv 2501.14082, "Tip Sheets"); the words are ours.
"""

from __future__ import annotations

import numpy as np

from evaluate.communication.tasks.base import Example, Task

COMPANIES = tuple(
    word
    for line in """\
Alder Atlas Beacon Birch Cobalt Comet Copper Coral Delta Ember Falcon Harbor Indigo Jasper Juniper Lumen Maple
Meridian Nimbus Onyx Orchid Osprey Quartz Raven Saffron Sierra Summit Tundra Vertex Willow
""".splitlines()
    for word in line.split()
)
GOOD = (
    "sales grew by a third this year",
    "its orders are at a record high",
    "profits beat every forecast",
    "it has just won a large contract",
    "its new product sold out in a week",
    "it has paid back all of its debt",
    "customers praise its service",
    "its margins widen every quarter",
)
BAD = (
    "sales fell by a third this year",
    "its largest customer has left",
    "profits missed every forecast",
    "it is being sued for fraud",
    "its new product was recalled",
    "it cannot pay back its debt",
    "customers complain about its service",
    "its founder has resigned",
)


def tipsheets(count: int, seed: int) -> Task:
    """Notes on two companies each.

    Args:
        count: Number of examples; in half of them the better company is named first.
        seed: Decides companies, signals and order.
    """
    rng = np.random.default_rng(seed)
    # The better one is the first of the note in half of the examples, and the first of the question in half of either.
    # Two that are left over differ in both.
    places = rng.permutation(np.array([0, 3, 1, 2])[np.arange(count) % 4])
    examples = []
    for place in map(int, places):
        better, worse = (COMPANIES[i] for i in rng.choice(len(COMPANIES), size=2, replace=False))
        good, bad = ([signals[i] for i in rng.choice(len(signals), size=2, replace=False)] for signals in (GOOD, BAD))
        notes = [f"{better}: {good[0]}, and {good[1]}.", f"{worse}: {bad[0]}, and {bad[1]}."]
        choices = (better, worse) if place < 2 else (worse, better)
        examples.append(
            Example(
                " ".join(notes if place % 2 == 0 else notes[::-1]),
                f"Which company should I invest in, {choices[0]} or {choices[1]}?",
                (better,),
                choices,
                "You should invest in",
                # Who likes a company's name is right about it again and again.
                cluster=better,
            )
        )
    return Task("tipsheets", tuple(examples))
