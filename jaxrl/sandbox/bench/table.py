"""Which figures there are, and their table."""

import asyncio
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence

from jaxrl.sandbox.bench import cost, extras, life, load
from jaxrl.sandbox.bench.accounting import Effort
from jaxrl.sandbox.bench.rows import Row

_MEASURES: dict[tuple[str, ...], Callable[[Effort], Awaitable[list[Row]]]] = {
    ("S1", "S2", "S3", "S4", "S5"): cost.measure,  # designs that take turns
    ("S6",): cost.warden,
    ("S7",): cost.latency,
    ("S8",): load.burst,
    ("S9",): load.lanes,
    ("S10",): load.deadlines,
    ("S11",): extras.cell,
    ("S12",): load.cores,
    ("S13",): life.loss,
    ("S14",): extras.carrier,
    ("S15",): life.leftovers,
}
FIGURES = tuple(figure for group in _MEASURES for figure in group)


def chosen(names: str | None) -> tuple[str, ...]:
    """Figures named in a comma-separated list, in either case; all of them for None.

    Raises:
        ValueError: naming what is no figure, or a list of none.
    """
    if names is None:
        return FIGURES
    wanted = tuple(name.strip().upper() for name in names.split(","))
    unknown = [repr(name) for name in wanted if name not in FIGURES]
    if unknown:
        raise ValueError(f"--figures: {', '.join(unknown)} is none of {', '.join(FIGURES)}; leave it out for all")
    return wanted


def main(figures: Sequence[str], effort: Effort, as_json: bool) -> int:
    """Measure and print row by row; 1 if any figure does not hold, else 0."""
    failed = False
    for group, measure in _MEASURES.items():
        if not set(group) & set(figures):
            continue
        for row in _rows(group, measure, effort):
            if row.figure in figures or row.figure == "cost":
                failed |= row.holds is False
                print(row.as_json() if as_json else row.as_text(), flush=True)
    return 1 if failed else 0


def _rows(group: Sequence[str], measure: Callable[[Effort], Awaitable[list[Row]]], effort: Effort) -> list[Row]:
    """What a measurement found; one that broke down fails its figures and lets the others go on."""
    try:
        return asyncio.run(measure(effort))
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return [Row(figure, f"not measured: {error!r}", None, "", "", False) for figure in group]
