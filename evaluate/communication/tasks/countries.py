"""*countries*: a person is at a landmark; in which country is the person?

The country is not in the text. The question names only the person, so that an answer needs both what the text says and
what the reader knows. The task is that of "Communicating Activations Between Language Model Agents" (arXiv 2501.14082,
"Countries"); the facts here are our own list. Countries that are not in an example are answers as well, so that a list
of many counts as the first of them.
"""

from __future__ import annotations

import numpy as np

from evaluate.communication.tasks.base import Example, Task

#: Landmark, country and what else the country is called.
LANDMARKS: tuple[tuple[str, tuple[str, ...]], ...] = tuple(
    (landmark, tuple(countries.split("|")))
    for landmark, countries in (
        line.split(" = ")
        for line in """\
the Eiffel Tower = France
the Louvre = France
the Palace of Versailles = France
Mont Saint-Michel = France
the Colosseum = Italy
the Leaning Tower of Pisa = Italy
the Trevi Fountain = Italy
the ruins of Pompeii = Italy
the Brandenburg Gate = Germany
Neuschwanstein Castle = Germany
Cologne Cathedral = Germany
the Sagrada Familia = Spain
the Alhambra = Spain
the Prado Museum = Spain
Big Ben = England|United Kingdom|Great Britain|Britain|UK
Stonehenge = England|United Kingdom|Great Britain|Britain|UK
Buckingham Palace = England|United Kingdom|Great Britain|Britain|UK
Edinburgh Castle = Scotland|United Kingdom|Great Britain|Britain|UK
the Statue of Liberty = United States|USA|US|America
the Grand Canyon = United States|USA|US|America
the Golden Gate Bridge = United States|USA|US|America
Mount Rushmore = United States|USA|US|America
the White House = United States|USA|US|America
the CN Tower = Canada
Banff National Park = Canada
Chichen Itza = Mexico
the pyramids of Teotihuacan = Mexico
Christ the Redeemer = Brazil
Sugarloaf Mountain = Brazil
Machu Picchu = Peru
the Nazca Lines = Peru
Easter Island = Chile
Torres del Paine = Chile
the Perito Moreno Glacier = Argentina
Angel Falls = Venezuela
the Great Wall = China
the Forbidden City = China
the Terracotta Army = China
Mount Fuji = Japan
the Fushimi Inari Shrine = Japan
the Tokyo Tower = Japan
the Taj Mahal = India
the Red Fort = India
the Golden Temple of Amritsar = India
Angkor Wat = Cambodia
Borobudur = Indonesia
the Petronas Towers = Malaysia
Marina Bay Sands = Singapore
Ha Long Bay = Vietnam
the Sydney Opera House = Australia
Uluru = Australia
the Great Barrier Reef = Australia
Milford Sound = New Zealand
the Great Pyramid of Giza = Egypt
the temple of Abu Simbel = Egypt
Table Mountain = South Africa
Mount Kilimanjaro = Tanzania
the rock churches of Lalibela = Ethiopia
Petra = Jordan
the Burj Khalifa = United Arab Emirates|UAE|Emirates|Dubai
the Hagia Sophia = Turkey|Türkiye
Cappadocia = Turkey|Türkiye
Red Square = Russia
the Hermitage Museum = Russia
the Acropolis = Greece
the Parthenon = Greece
the Charles Bridge = Czech Republic|Czechia
the Little Mermaid statue = Denmark
the Atomium = Belgium
the Rijksmuseum = Netherlands|Holland
the Matterhorn = Switzerland
Schönbrunn Palace = Austria
the Cliffs of Moher = Ireland
the Belém Tower = Portugal
Wawel Castle = Poland
the Blue Lagoon near Reykjavik = Iceland
""".splitlines()
    )
)
NAMES = tuple(
    word
    for line in """\
Maria Ahmed Yuki Pedro Anna Kofi Lena Ravi Sofia Omar Nina Paul Grace Ivan Chloe Diego Hana Eric Julia Tariq
Emma Jonas Aisha Marco Vera Samir Clara Felix Rosa Henry Leila Oscar
""".splitlines()
    for word in line.split()
)


def countries(count: int, seed: int) -> Task:
    """Persons at landmarks; each landmark comes once before any comes again.

    Args:
        count: Number of examples.
        seed: Decides names and order.
    """
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(LANDMARKS)) for _ in range(count // len(LANDMARKS) + 1)])[:count]
    examples = []
    for i in order:
        landmark, names = LANDMARKS[i]
        person = NAMES[int(rng.integers(len(NAMES)))]
        question, cue = f"Which country is {person} in?", f"{person} is in"
        examples.append(Example(f"{person} is at {landmark}.", question, names, cue=cue, cluster=landmark))
    return Task("countries", tuple(examples), others=tuple(name for _, names in LANDMARKS for name in names))
