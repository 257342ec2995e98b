"""A store of format version 1, as the featstore of that version wrote it, with its models and its text.

``data/version_1.tar.xz`` was made at commit 0cbf1f8, in the directory that :func:`unpack` makes again:

    featstore extract --model a=./a --model b=./b --layers a=1,2 --layers b=0,3 --dataset 'text:text/*.txt' \\
        --store old.zarr --device cpu --window-bytes 256 --shard-rows 1024 --moments
    featstore pair old.zarr --policy word

``text/`` has six passages of the Universal Declaration of Human Rights: three in Burmese, two in Hebrew, one in
English. ``a`` and ``b`` are random Llamas, of 2 blocks and width 8 and of 3 blocks and width 12. Their byte-level
tokenizers were trained on different articles of it; b puts ``<s>`` before a text. Tokens of both end inside characters,
where version 1 recorded the end of the character: see :data:`TRUTH`.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

from tests.support import ROOT

#: What is true of the old store, counted from the tokens' own bytes: rows and wrong byte ends of each model, pairs and
#: wrong pairs (which join states that have read different bytes) of each policy.
TRUTH = {"a": (1143, 190), "b": (1211, 80), "end": (982, 44), "word": (158, 0)}

ARCHIVE = ROOT / "tests" / "support" / "data" / "version_1.tar.xz"


def unpack(into: Path) -> Path:
    """Unpack the old store.

    Args:
        into: A directory; gets ``a``, ``b``, ``text`` and ``old.zarr``. The store names the others relative to it.

    Returns:
        The store.
    """
    # Python before 3.11.4 has no extraction filters; of our own archive only plain files are wanted.
    with tarfile.open(ARCHIVE) as archive:
        for entry in archive:
            handle = archive.extractfile(entry) if entry.isfile() else None
            if handle is not None:
                path = into / entry.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(handle.read())
    return into / "old.zarr"
