"""Two language models read a corpus; their residual streams land in a Zarr v3 store, paired across tokenizers.

Importing this package teaches zarr-python the ``bfloat16`` and ``float8_e4m3fn`` data types, so that
``zarr.open_group(store)`` works too. Reading needs numpy and zarr only.
"""

from featstore.errors import FeatstoreError
from featstore.store import Store, open_store
from featstore.store.format.dtypes import register

__all__ = ["FeatstoreError", "Store", "open_store"]

register()
