"""xarray alone: a store as a tree of datasets, and every group as a dataset of its own."""

import json
import sys
import warnings

import numpy as np
import xarray

with open(sys.argv[1]) as task:  # noqa: PTH123
    stores = json.load(task)["stores"]
warnings.simplefilter("error")
read, said = {}, {}
for store, path in stores.items():
    with xarray.open_datatree(path, engine="zarr", chunks=None) as tree:
        for group in tree.groups:
            alone = xarray.open_zarr(path, group=group.strip("/") or None, chunks=None)
            assert dict(alone.sizes) == dict(tree[group].to_dataset(inherit=False).sizes)
            for name, array in tree[group].to_dataset(inherit=False).data_vars.items():
                key = f"{group}/{name}".strip("/")
                read[f"{store}:{key}"] = array.values
                np.testing.assert_array_equal(alone[name].values, array.values)
                said[f"{store}:{key}"] = list(array.dims)
np.savez(sys.argv[2], **read)
sys.stdout.write(json.dumps(said))
