"""Every error this project raises on purpose.

Each class derives from :class:`FeatstoreError` and from the built-in exception a Python programmer would expect, so
callers can catch either. A message names the value that was wrong and what to do next; the commands print it as one
line and exit with code 2.
"""

from __future__ import annotations


class FeatstoreError(Exception):
    """Base class of all errors that a user can mend."""


class SpecError(FeatstoreError, ValueError):
    """A flag or argument does not parse or names something impossible."""


class AttentionError(SpecError):
    """An implementation of attention is not in the list, or another one than the chosen one runs."""


class CorpusError(FeatstoreError, ValueError):
    """The text cannot be read, or there is too little of it."""


class OffsetError(FeatstoreError, ValueError):
    """A tokenizer's offsets do not rebuild the text they came from."""


class ModelLoadError(FeatstoreError, OSError):
    """A model, its configuration or its tokenizer cannot be loaded."""


class StrangeReferenceError(FeatstoreError, PermissionError):
    """A file names a model or a text that the user has not named, and nothing says that it may be used."""


class PickledWeightsError(ModelLoadError, PermissionError):
    """A model has no weights but pickled ones, which nothing says may be read."""


class GatedModelError(ModelLoadError, PermissionError):
    """A model exists, but its licence must be accepted or a login is missing."""


class WeightsError(ModelLoadError, ValueError):
    """A checkpoint does not hold the weights of its model, or holds others besides."""


class VocabularyError(FeatstoreError, IndexError):
    """A tokenizer gives a token id that its model's embedding has no row for."""


class UnsupportedArchitectureError(FeatstoreError, TypeError):
    """A model has no decoder blocks where a residual stream can be read."""


class ProbeError(FeatstoreError, RuntimeError):
    """A test of the instrument fails on the model at hand: what was asked for would mean something else."""


class LayerRangeError(SpecError, IndexError):
    """A layer lies outside 0..L of its model."""


class StoreNotFoundError(FeatstoreError, FileNotFoundError):
    """There is nothing at the given store path."""


class StoreFormatError(FeatstoreError, ValueError):
    """What lies at the path is not a feature store this version can read."""


class StoreStateError(FeatstoreError, RuntimeError):
    """The store exists, but not in the state the request needs (unfinished, another plan, no such model)."""


class StoreBusyError(FeatstoreError, BlockingIOError):
    """Another process is writing to the store."""


class CorruptDataError(FeatstoreError, ValueError):
    """Bytes on disk do not match their checksum, or a metadata document is damaged."""


class MemberError(CorruptDataError):
    """A JSON document is whole, but one of its members is missing or not of its type."""


class ContradictionError(CorruptDataError):
    """Bytes are those that were sealed, but what they say contradicts something else in the store.

    Attributes:
        what: The contradiction alone, without the place and the remedy.
    """

    def __init__(self, where: object, what: str) -> None:
        super().__init__(f"{where}: {what}; run `featstore verify`, and restore it or extract again")
        self.what = what

    def __reduce__(self) -> tuple[object, ...]:
        return _contradiction, (str(self), self.what)


def _contradiction(message: str, what: str) -> ContradictionError:
    error = ContradictionError("", what)
    error.args = (message,)
    return error


class NonFiniteStateError(FeatstoreError, ArithmeticError):
    """A model produced NaN or infinity where a hidden state was expected."""


class NoSpaceError(FeatstoreError, OSError):
    """The disk cannot hold what was asked for."""


class WriteError(FeatstoreError, OSError):
    """A file or a folder cannot be written where it was asked for."""


class LinkError(WriteError):
    """A link stands where something is to be written: nothing is written through it."""


class PairingError(FeatstoreError, ValueError):
    """There are no pairs, or fewer than the operation needs."""


class FitError(FeatstoreError, ValueError):
    """A map cannot be fitted from what was given."""


class AdapterError(FeatstoreError, ValueError):
    """A run directory does not hold usable maps, or they do not fit the models or the store."""


class UnknownMapError(FeatstoreError, KeyError):
    """A run has no map of this name."""

    #: KeyError would show the message as a quoted key.
    __str__ = Exception.__str__


class MissingPackageError(FeatstoreError, ImportError):
    """An optional package is needed and not installed; the message says which."""


class StoreAccessError(FeatstoreError, OSError):
    """A store's place cannot be reached, or refuses."""


class WorkersError(FeatstoreError, RuntimeError):
    """Worker processes died again and again, or the scheduler they belong to went away."""


class FeatstoreWarning(UserWarning):
    """Something that a reader of the results has to know; commands say it in one line on stderr."""


class TemplateWarning(FeatstoreWarning):
    """A chat template leaves out what a conversation says beside its messages' contents."""


class OldStoreWarning(FeatstoreWarning):
    """A store of an older format version was opened: it reads, but not all in it is what a new one would hold."""
