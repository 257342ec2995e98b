"""Two language models read a corpus; their residual streams land in a Zarr v3 store, paired across tokenizers.

Importing this package teaches zarr-python the ``bfloat16`` and ``float8_e4m3fn`` data types, so that
``zarr.open_array(f"{store}/models/llama/resid/16")`` works too. Reading needs numpy and zarr only; what needs more is
imported when it is called.
"""

from typing import TYPE_CHECKING, Any

from featstore import errors
from featstore.errors import FeatstoreError
from featstore.store import Store, open_store
from featstore.store.format.dtypes import register

if TYPE_CHECKING:
    from featstore.api import demo_pair, extract, rebuild, sample_texts, small_models

__all__ = [
    "FeatstoreError",
    "Store",
    "demo_pair",
    "errors",
    "extract",
    "open_store",
    "rebuild",
    "sample_texts",
    "small_models",
]

register()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from featstore import api

    value = getattr(api, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    # What people complete: no helpers of this module, and no rooms, which are imported by their own names.
    return sorted(__all__)
