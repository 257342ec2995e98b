#!/usr/bin/env bash
# zarr-python 3.1.6: one array of a data type it does not know, under consolidated metadata, refuses the whole group.
#
# A group holds an int32 array and one of bfloat16, a type of the Zarr extension registry. Once the metadata is
# consolidated, `open_group` parses every document in it, and one that it cannot parse takes the others with it. Without
# the entry the group opens, lists, and reads the int32 array. A second thing follows for whoever leaves entries out: a
# group of which the consolidated metadata lists no member is listed from the store instead, where the unknown array is;
# unless its entry has an empty `consolidated_metadata` of its own, which zarr-python writes but does not ask for.
#
# Seen: "No Zarr data type found that matches 'bfloat16'" for the group with the entry; 2 members without it, the error
# again for the members of the group whose only array was left out, and no member once its entry says so. (Of a group
# that lies at the root nothing is looked for; this one lies in another.)
# Whoever writes arrays of extension types leaves them out of consolidated metadata, or nobody reads the rest.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check zarr==3.1.6
cat >"$place/group.py" <<'PY'
import json
import sys
from pathlib import Path

import zarr

place = Path(sys.argv[1])
group = zarr.create_group(place)
group.create_array("numbers", data=zarr.zeros(4, dtype="int32")[:])
group.create_group("top").create_group("below").create_array("states", shape=(4,), dtype="uint16")
document = place / "top" / "below" / "states" / "zarr.json"
document.write_text(document.read_text().replace('"uint16"', '"bfloat16"'))
documents = {p.parent.relative_to(place).as_posix(): json.loads(p.read_text()) for p in place.rglob("zarr.json")}
root = documents.pop(".")


def consolidated(entries):
    return {"kind": "inline", "must_understand": False, "metadata": entries}


def outcome(entries, look):
    (place / "zarr.json").write_text(json.dumps({**root, "consolidated_metadata": consolidated(entries)}))
    try:
        return look(zarr.open_group(place, mode="r"))
    except ValueError as error:
        return str(error)


without = {name: entry for name, entry in documents.items() if name != "top/below/states"}
closed = {**without, "top/below": {**without["top/below"], "consolidated_metadata": consolidated({})}}
seen = [
    outcome(documents, lambda group: len(group.members())),
    outcome(without, lambda group: (len(group.members()), int(group["numbers"][:].sum()))),
    outcome(without, lambda group: len(group["top/below"].members())),
    outcome(closed, lambda group: len(group["top/below"].members())),
]
print(*seen, sep="\n")
refused = "No Zarr data type found that matches 'bfloat16'"
sys.exit(0 if seen == [refused, (2, 0), refused, 0] else 1)
PY
"$place/venv/bin/python" "$place/group.py" "$place/group.zarr" 2>/dev/null && echo "as stated" || { echo "no longer as stated" >&2; exit 1; }
