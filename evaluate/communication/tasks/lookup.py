"""*lookup*: several things and their codes; what is the code of one of them?

Nothing but the context tells: no model knows the codes. The number of pairs says how much there is to remember. Every
place in the context is asked for equally often, so that an answer from one place is right once in as many examples as
there are pairs, which is the task's chance: it shows that a code arrived, and not which.
"""

from __future__ import annotations

import numpy as np

from evaluate.communication.tasks.base import Example, Task
from featstore.errors import SpecError

THINGS = tuple(
    word
    for line in """\
lamp door chair window table mirror clock carpet shelf drawer stove kettle bottle basket ladder hammer bucket
barrel candle pillow blanket curtain statue fountain gate tower bridge boat wagon tent
""".splitlines()
    for word in line.split()
)
_LOWEST, _HIGHEST = 1000, 9999


def lookup(count: int, seed: int, pairs: int = 4) -> Task:
    """Things with codes of four digits, one of which is asked for.

    Args:
        count: Number of examples.
        seed: Decides things, codes and which is asked for.
        pairs: Things in every context.

    Raises:
        SpecError: No such number of things.
    """
    if not 1 <= pairs <= len(THINGS):
        raise SpecError(f"task lookup with {pairs} pairs: choose 1 to {len(THINGS)}, such as lookup:4")
    rng = np.random.default_rng(seed)
    examples: list[Example] = []
    others: list[str] = []
    for asked in map(int, rng.permutation(np.arange(count) % pairs)):
        things = [THINGS[i] for i in rng.choice(len(THINGS), size=pairs, replace=False)]
        codes = [str(code) for code in _LOWEST + rng.choice(_HIGHEST - _LOWEST + 1, size=pairs, replace=False)]
        others += codes
        examples.append(
            Example(
                " ".join(f"The code of the {thing} is {code}." for thing, code in zip(things, codes, strict=True)),
                f"What is the code of the {things[asked]}?",
                (codes[asked],),
                cue=f"The code of the {things[asked]} is",
                cluster=things[asked],
            )
        )
    return Task("lookup", tuple(examples), others=tuple(others))
