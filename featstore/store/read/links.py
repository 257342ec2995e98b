"""Links in a store: which there are below its root, and where they lead.

Reading follows them, since a layer may lie on another disk. Nothing else about a store says that it is in pieces, so
whoever looks at one is told; what lies outside it is not the store's own, and can be changed without it.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featstore.store.read.store import Store


@dataclass(frozen=True)
class Link:
    """A link below a store's root.

    Attributes:
        name: Path within the store.
        target: Where it leads in the end, absolute.
        outside: Whether that lies outside the store.
        found: Whether anything is there.
    """

    name: str
    target: str
    outside: bool
    found: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, by the names of the attributes."""
        return asdict(self)

    def __str__(self) -> str:
        where = "outside the store" if self.outside else "within the store"
        return f"{self.name} is a link to {self.target}, {where if self.found else 'where nothing is'}"


def links_of(store: Store) -> list[Link]:
    """Every link to a file or folder below a store's root, by name; what links lead to is not searched.

    Args:
        store: Any store; one that is no directory on this machine has no links.
    """
    if not isinstance(store.path, Path):
        return []
    root, found = store.path.resolve(), []
    for folder, folders, files in os.walk(root):
        for path in (Path(folder, name) for name in (*folders, *files)):
            if path.is_symlink():
                target = Path(os.path.realpath(path))
                name = path.relative_to(root).as_posix()
                found.append(Link(name, str(target), not target.is_relative_to(root), target.exists()))
    return sorted(found, key=lambda link: link.name)


def outside_damage(links: list[Link]) -> list[str]:
    """What `verify` says of links that lead outside a store.

    Args:
        links: From :func:`links_of`.
    """
    return [
        f"{link}; put the file or folder itself there, or accept such links with --allow-links"
        for link in links
        if link.outside
    ]
