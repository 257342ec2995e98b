"""A safetensors file as somebody else may have written it: its head is checked before a tensor is read.

A head announces names, types and sizes; what it announces is compared with the file's length before anything is
allocated, and damage is told in one line without a library's words.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from featstore.errors import CorruptDataError, FeatstoreError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Head(NamedTuple):
    """What a file announces of one tensor.

    Attributes:
        dtype: As the format names it, such as ``F32``.
        shape: Lengths of its axes.
    """

    dtype: str
    shape: tuple[int, ...]


#: Types that a reader here asks for, as numpy names them.
NUMPY = {"F32": "float32", "F64": "float64", "I64": "int64", "I32": "int32", "U8": "uint8", "BOOL": "bool"}


@dataclass(frozen=True)
class Tensors:
    """An open file.

    Attributes:
        path: The file.
        heads: What it announces, by name.
        metadata: Text by name.
    """

    path: Path
    heads: Mapping[str, Head]
    metadata: Mapping[str, str]
    _file: Any
    _error: type[FeatstoreError]
    _remedy: str

    def read(self, name: str, dtype: str = "F32", shape: tuple[int | None, ...] | None = None) -> NDArray[Any]:
        """A tensor of the type and shape that the reader needs.

        Args:
            name: Of the tensor.
            dtype: As the format names it; one of :data:`NUMPY`.
            shape: Lengths of its axes, None for one that may have any; None for any shape.

        Raises:
            FeatstoreError: It is missing, or of another type or shape; of the kind that the file was opened with.
        """
        if name not in self.heads:
            raise self.damaged(f"has no tensor {name!r}")
        head = self.heads[name]
        fits = shape is None or (
            len(shape) == len(head.shape)
            and all(want in (None, have) for want, have in zip(shape, head.shape, strict=True))
        )
        if head.dtype != dtype or not fits:
            wanted = "" if shape is None else f" {tuple('any' if each is None else each for each in shape)}"
            raise self.damaged(f"{name!r} is {head.dtype} {head.shape}, expected {dtype}{wanted}")
        found: NDArray[np.generic] = self._file.get_tensor(name)
        return found

    def finite(self, name: str, shape: tuple[int | None, ...] | None = None) -> NDArray[Any]:
        """A float32 tensor without NaN and infinity.

        Args:
            name: Of the tensor.
            shape: As of :meth:`read`.

        Raises:
            FeatstoreError: As :meth:`read`, or it holds NaN or infinity.
        """
        import numpy as np

        found = self.read(name, "F32", shape)
        if not np.isfinite(found).all():
            raise self.damaged(f"{name!r} holds NaN or infinity")
        return found

    def damaged(self, why: str) -> FeatstoreError:
        """An error about this file.

        Args:
            why: A sentence's rest.
        """
        return self._error(f"{self.path}: {why}; {self._remedy}")


@contextlib.contextmanager
def opened(path: Path, error: type[FeatstoreError] = CorruptDataError, *, remedy: str) -> Iterator[Tensors]:
    """Open a safetensors file.

    Args:
        path: The file.
        error: Kind of the errors.
        remedy: What to do about damage.

    Raises:
        FeatstoreError: There is no such file, it cannot be read, or its head does not fit it.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        what = "is not a file" if path.exists() else "is missing"
        raise error(f"{path} {what}, the run is damaged; {remedy}")
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            heads = {name: Head(each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
            metadata = dict(file.metadata() or {})
        except (SafetensorError, OSError, ValueError, TypeError, OverflowError, RecursionError) as problem:
            raise error(f"{path} is damaged: its head {_words(problem)}; {remedy}") from problem
        yield Tensors(path, heads, metadata, file, error, remedy)


def _words(problem: Exception) -> str:
    """What is wrong with a head, in few words of ours."""
    if isinstance(problem, OSError):
        return f"cannot be read ({problem.strerror or 'no reason is given'})"
    text = str(problem).lower()
    if "json" in text or "utf" in text:
        return "is not the JSON of a safetensors file"
    if "shape" in text or "offset" in text or "overflow" in text:
        return "announces tensors that do not lie where it says"
    return "does not fit the file's length, which may be cut short"
