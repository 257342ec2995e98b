"""zarr-python alone: lists a store from its consolidated metadata, and by looking, and reads every array it lists."""

import json
import sys
import warnings

import numpy as np
import zarr

with open(sys.argv[1]) as task:  # noqa: PTH123
    stores = json.load(task)["stores"]
warnings.simplefilter("error")
read, said = {}, {}
for store, path in stores.items():
    group = zarr.open_group(path, mode="r")
    for name, node in group.members(max_depth=None):
        if isinstance(node, zarr.Array):
            read[f"{store}:{name}"] = node[...]
            assert group[name].shape == node.shape
    with warnings.catch_warnings():
        # That the manifest is no part of the hierarchy, it says when it looks for itself.
        warnings.filterwarnings("ignore", "Object at (manifest|.writer.lock) is not recognized")
        looking = zarr.open_group(path, mode="r", use_consolidated=False)
        said[store] = {
            "groups": sorted(name for name, _ in group.groups()),
            "by looking": sorted(name for name, _ in looking.groups()),
            "members": sorted(name for name, _ in looking.members()),
            "model": sorted(name for name, _ in looking["models/a"].members()),
            "states": sorted(name for name, _ in group["models/a/resid"].members()),
            "tree": str(group.tree()),
        }
        for below in ("models/a/tokens", "models/a/norm", "corpus", "corpus/document", "pairs/a__b/end"):
            for name, node in looking[below].arrays():
                np.testing.assert_array_equal(node[...], read[f"{store}:{below}/{name}"])
np.savez(sys.argv[2], **read)
sys.stdout.write(json.dumps(said))
