"""Two language models read a corpus; their residual streams land in a Zarr v3 store, paired across tokenizers.

Importing this package teaches zarr-python the ``bfloat16`` data type, so that ``zarr.open_group(store)`` works too.
Reading needs numpy and zarr only.
"""

from featstore import formats as _formats
from featstore.errors import FeatstoreError
from featstore.store import Store, open_store

__all__ = ["FeatstoreError", "Store", "open_store"]

_formats.register()
