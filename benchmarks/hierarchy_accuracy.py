"""The table of the hierarchy study: every check, its value and its target.

    python benchmarks/hierarchy_accuracy.py [FOLDER]

Runs `stagewise study hierarchy` into FOLDER (default runs/hierarchy; traces that are there are not sampled again) and
prints what every estimator is held to: the closed forms against training and retraining, unrolling against finite
differences, sampled influence against window ablations, sign flips and peaks against theory, Adam's metric, and the
linear datamodelling score over training. FOLDER/report.html shows the pictures.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stagewise.reporting import tables
from stagewise.run.progress import progress_bars
from stagewise.studies.hierarchy.study import checks_table, claims_table, study

console = Console(width=150)


def show(content: tables.Table) -> None:
    table = Table(*content.columns, title=content.title)
    for row in content.rows:
        table.add_row(*map(escape, row))  # brackets are intervals, not markup
    console.print(table)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/hierarchy")
    start = time.perf_counter()
    with progress_bars(console) as progress:
        parts = study(folder, progress)
    show(checks_table(parts))
    show(claims_table(parts))
    for part in parts:
        for table in part.section.parts:
            if isinstance(table, tables.Table):
                show(table)
    console.print(f"{time.perf_counter() - start:.0f} seconds; report: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
