"""What ``jaxrl check`` prints: one table and a verdict, or one JSON object."""

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxrl.check import cost, ledger, targets
from jaxrl.check.run import ASSURED, Report, Result

_WORDS = {
    "weights": "weights",
    "optimizer": "optimizer",
    "critic": "critic",
    "teacher": "teacher",
    "reference": "reference",
    "engine": "engine's weights",
    "pages": "KV pages",
    "gradients": "gradients",
    "activations": "activations",
}


_RARE = ("critic", "teacher", "reference")
"""What most runs do not have; no column is shown for what a run lacks."""


def show(report: Report, console: Console) -> None:
    """Print a report."""
    result = report.result
    console.print(_memory(result))
    if "decode" in result.compiled:
        console.print(_work(result))
        for phase in cost.phases(result):
            console.print(
                f"{phase.name}: at least {phase.seconds:,.0f} s of such a step, at data-sheet rates: "
                f"{phase.flops / 1e15:,.3g} PFLOP, {phase.read / 1e12:,.3g} TB read, {phase.sent / 1e12:,.3g} TB sent, "
                f"{phase.beyond / 1e12:,.3g} TB of it beyond the slice or host, by each device",
                soft_wrap=True,
                highlight=False,
            )
    for line in result.kernels:
        console.print(line, soft_wrap=True, highlight=False)
    console.print(verdict(result))
    if result.fits:
        return
    for remedy, outcome in report.mended:
        console.print(f"  fits with {remedy.options(result.target)}", soft_wrap=True, highlight=False)
        left = (outcome.memory - outcome.fullest.total) / targets.GIB
        fullest = outcome.compiled.get(outcome.fullest.name)
        how = f" with little effort of the compiler, over {ASSURED:.0%}" if fullest and fullest.effort else ""
        costs = "; ".join(remedy.words)
        console.print(f"    re-checked{how}: {left:.1f} GiB left; {costs}", soft_wrap=True, highlight=False)
    if not report.mended:
        console.print(
            f"  none of the {report.tried} changes tried makes it fit; take a larger target or a smaller model"
        )


def verdict(result: Result) -> str:
    """One sentence: whether it fits, and what is left or is too much where."""
    full = result.fullest
    where = f"{result.devices} devices of {result.target.name}"
    if result.fits:
        return f"fits: {where}, {(result.memory - full.total) / targets.GIB:.1f} GiB left during {full.name!r}"
    if full.refused:
        return f"does not fit: {where}, the compiler has no room for {full.name!r}: {full.refused}"
    largest = max(full.parts, key=lambda part: full.parts[part])
    return (
        f"does not fit: {where}, {full.name!r} needs {full.total / targets.GIB:.1f} GiB of "
        f"{result.memory / targets.GIB:.1f}, most of it {_WORDS[largest]}"
    )


def as_json(report: Report) -> str:
    """One JSON object; bytes are those of one device."""
    whole = _as_values(report.result) | {
        "remedies": [
            {"target": remedy.target.name, "settings": remedy.settings, "costs": remedy.words, **_as_values(outcome)}
            for remedy, outcome in report.mended
        ]
    }
    return json.dumps(whole)


def _as_values(result: Result) -> dict[str, Any]:
    return {
        "target": result.target.name,
        "devices": result.devices,
        "memory": result.memory,
        "fits": result.fits,
        "verdict": verdict(result),
        "kernels": list(result.kernels),
        "left": result.memory - result.fullest.total,
        "moments": [
            {"name": moment.name, "total": moment.total, "refused": moment.refused, **moment.parts}
            for moment in result.moments
        ],
        "programs": {name: dataclasses.asdict(program) for name, program in result.compiled.items()},
        "micro_batches": cost.micro_batches(result),
        "phases": [dataclasses.asdict(phase) for phase in cost.phases(result)] if "decode" in result.compiled else [],
    }


def _memory(result: Result) -> Table:
    table = Table(title=f"GiB on each device of {result.target.name}", title_justify="left")
    table.add_column("during")
    shown = [part for part in ledger.PARTS if part not in _RARE or any(moment.parts[part] for moment in result.moments)]
    for part in shown:
        table.add_column(_WORDS[part], justify="right")
    table.add_column("in all", justify="right")
    table.add_column("left", justify="right")
    for moment in result.moments:
        amounts = [f"{moment.parts[part] / targets.GIB:.2f}" for part in shown]
        left = (result.memory - moment.total) / targets.GIB
        mark = "refused" if moment.refused else f"{left:.2f}"
        table.add_row(moment.name, *amounts, f"{moment.total / targets.GIB:.2f}", mark)
    return table


def _work(result: Result) -> Table:
    table = Table(title=f"work of a step of {cost.micro_batches(result)} micro-batches, at most", title_justify="left")
    for name in ("program", "TFLOP in all", "collectives", "GB sent by a device", "beyond its slice or host"):
        table.add_column(name, justify="left" if name in ("program", "collectives") else "right")
    for name, program in result.compiled.items():
        kinds = ", ".join(f"{one['count']} {one['kind']}" for one in program.traffic) or "none"
        near, far = (sum(one[field] for one in program.traffic) / 1e9 for field in ("sent", "beyond"))
        table.add_row(name, f"{program.flops / 1e12:,.3g}", kinds, f"{near:.3g}", f"{far:.3g}")
    return table
