"""One self-contained HTML page of everything that was measured, from the files of run directories alone.

`inputs` reads directories, `numbers` shows figures, `words` says what they mean, `tables`, `cka` and `sections` are the
parts of the page, `svg` and `heatmap` draw, `page` renders.
"""

from evaluate.report.page import build_report, write_report

__all__ = ["build_report", "write_report"]
