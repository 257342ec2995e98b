"""tensorstore alone: it reads what it is told, states of every format as numbers."""

import json
import sys

import numpy as np
import tensorstore

with open(sys.argv[1]) as file:  # noqa: PTH123
    task = json.load(file)
read = {}
for store, path in task["stores"].items():
    for name in task["arrays"][store]:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/{name}"}}
        array = tensorstore.open(spec, open=True).result()
        assert all(array.domain.labels), name
        values = array.read().result()
        # numpy's archives know neither bfloat16 nor float8; float32 holds every value of both.
        small = "float" in array.dtype.name and values.dtype.itemsize < 4
        read[f"{store}:{name}"] = values.astype(np.float32) if small else values
np.savez(sys.argv[2], **read)
