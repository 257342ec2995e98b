"""One self-contained HTML page of everything that was measured, from the files of run directories alone.

`inputs` reads directories, `numbers` shows figures, `names` and `words` say what they mean; `tables`, `stitched`,
`curves`, `rates`, `cka` (with `matrices` and `measures`), `training`, `communicate`, `texts` and `sections` are the
parts of the page; `svg` and `heatmap` draw, `page` renders.
"""

from evaluate.reporting.page import build_report, write_report

__all__ = ["build_report", "write_report"]
