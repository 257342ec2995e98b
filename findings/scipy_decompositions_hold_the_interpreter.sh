#!/usr/bin/env bash
# scipy 1.17.1, numpy 2.4.6: other threads stand still while scipy decomposes a matrix, and go on while numpy does.
#
# A second thread looks at the clock every two milliseconds while the first one decomposes the covariance of random
# rows, by numpy.linalg and by scipy.linalg (eigh and svd), which call LAPACK both.
#
# Seen: with numpy, which releases the interpreter's lock, the longest pause of the thread is a small part of the call;
# with scipy, which holds it for as long as the routine runs, it is nearly all of it.
# Whoever decomposes layers of 4096 dimensions in threads (Dask's threaded scheduler, a reader that fetches ahead, a
# progress bar) waits for one after the other with scipy: use numpy's, or processes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 scipy==1.17.1
cat >"$place/threads.py" <<'PY'
import sys
import threading
import time

import numpy as np
import scipy.linalg

rows = np.random.default_rng(0).standard_normal((1500, 1000))
gram = rows.T @ rows
scipy.linalg.eigh(gram[:4, :4]), scipy.linalg.svd(gram[:4, :4])


def paused(work):
    """The longest pause of another thread while some work is done, as a part of the work's time."""
    looked, ended = [], threading.Event()

    def look():
        while not ended.is_set():
            looked.append(time.perf_counter())
            time.sleep(0.002)

    thread = threading.Thread(target=look)
    thread.start()
    time.sleep(0.05)
    begun = time.perf_counter()
    work()
    seconds = time.perf_counter() - begun
    time.sleep(0.05)
    ended.set()
    thread.join()
    return max(after - before for before, after in zip(looked, looked[1:])) / seconds


as_stated = True
for name in ("eigh", "svd"):
    for library in (np.linalg, scipy.linalg):
        share = paused(lambda: getattr(library, name)(gram))
        print(f"{library.__name__}.{name}: the longest pause is {share:.2f} of the call")
        as_stated &= share > 0.6 if library is scipy.linalg else share < 0.4
sys.exit(0 if as_stated else 1)
PY
OPENBLAS_NUM_THREADS=1 "$place/venv/bin/python" "$place/threads.py" && echo "as stated" || { echo "no longer as stated" >&2; exit 1; }
