"""A matplotlib figure that a notebook shows without pyplot and its global state."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure


class Drawing(Figure):
    """A figure that displays itself, and is otherwise a plain one: ``savefig``, ``axes`` and so on."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()
