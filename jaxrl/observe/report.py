"""The end of a run: one table to read, one ``summary.json`` for programs."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from jaxrl.observe.progress import duration
from jaxrl.observe.terminal import printable

SUMMARY_FILE = "summary.json"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A share between 0 and 1 with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One evaluation figure before and after training; None where it was not measured."""

    label: str  # e.g. "pass@1, sampled"
    before: Estimate | None
    after: Estimate | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What a finished run has to say.

    Attributes:
        comparisons: evaluation on problems never trained on; the first is the headline of the summary.
        tool_error_share_in_correct: of the last steps' correct episodes; None if they made no calls.
        tokens_per_second: response tokens over the whole reinforcement stage.
        seconds_by_phase: wall-clock seconds of the whole run.
        left_out: episodes that faults of ours kept out of training.
        skipped_steps: steps of which selection kept nothing.
        next_command: what to try next.
    """

    title: str
    run_folder: str
    steps: int
    comparisons: tuple[Comparison, ...]
    tool_error_share_in_correct: float | None
    tokens_per_second: float
    seconds_by_phase: Mapping[str, float]
    left_out: int = 0
    skipped_steps: int = 0
    alarms: tuple[str, ...] = ()
    export_path: str = ""
    next_command: str = ""


def summary(report: Report) -> dict[str, Any]:
    """The report as JSON values. Figures that were not measured are null."""
    headline = report.comparisons[0] if report.comparisons else Comparison("", None, None)
    return {
        "title": report.title,
        "steps": report.steps,
        "pass_rate_before": headline.before.value if headline.before else None,
        "pass_rate_after": headline.after.value if headline.after else None,
        "tool_error_share_in_correct": report.tool_error_share_in_correct,
        "tokens_per_second": report.tokens_per_second,
        "seconds": sum(report.seconds_by_phase.values()),
        "seconds_by_phase": dict(report.seconds_by_phase),
        "left_out": report.left_out,
        "skipped_steps": report.skipped_steps,
        "evaluations": [dataclasses.asdict(comparison) for comparison in report.comparisons],
        "alarms": list(report.alarms),
        "export_path": report.export_path,
    }


def write_summary(folder: pathlib.Path, report: Report) -> pathlib.Path:
    """Write ``summary.json`` into the run folder, whole or not at all."""
    path = folder / SUMMARY_FILE
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(summary(report), indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def final_table(report: Report) -> RenderableType:
    """The report to print; at most 100 columns where the paths allow."""
    heading = Text(f"jaxrl · {printable(report.title)} · {report.steps} steps done", "bold")
    parts: list[RenderableType] = [Rule(heading, align="left")]
    if report.comparisons:
        caption = Text("95 % intervals, on problems never trained on", "dim")
        parts += [_comparison_table(report.comparisons), caption, Text()]
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    if report.tokens_per_second:  # there was reinforcement
        share = report.tool_error_share_in_correct
        facts.add_row("failed tool calls in correct episodes", "no calls" if share is None else f"{share:.1%}")
        facts.add_row("response tokens a second", f"{report.tokens_per_second:,.0f}")
    facts.add_row("time", _time_by_phase(report.seconds_by_phase))
    if report.left_out:
        facts.add_row("episodes left out (our faults)", Text(f"{report.left_out}", "yellow"))
    if report.skipped_steps:
        facts.add_row("steps with nothing to train on", Text(f"{report.skipped_steps}", "yellow"))
    for alarm in report.alarms:
        facts.add_row("alarm", Text(printable(alarm), "yellow"))
    facts.add_row("run folder", printable(report.run_folder))
    if report.export_path:
        facts.add_row("exported model", printable(report.export_path))
    if report.next_command:
        facts.add_row("try next", Text(printable(report.next_command), "bold cyan"))
    return Group(*parts, facts)


def _comparison_table(comparisons: tuple[Comparison, ...]) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for comparison in comparisons:
        table.add_row(comparison.label, _estimate(comparison.before), _estimate(comparison.after), _change(comparison))
    return table


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{100 * estimate.value:.1f}%  ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def _change(comparison: Comparison) -> Text:
    """The difference in points; coloured only where the two intervals do not overlap."""
    before, after = comparison.before, comparison.after
    if before is None or after is None:
        return Text("-")
    style = "bold green" if after.low > before.high else "bold red" if after.high < before.low else ""
    return Text(f"{100 * (after.value - before.value):+.1f} points", style)


def _time_by_phase(seconds_by_phase: Mapping[str, float]) -> str:
    total = sum(seconds_by_phase.values())
    phases = sorted(seconds_by_phase.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {duration(seconds)} ({seconds / total:.0%})" for name, seconds in phases if total)
    return f"{duration(total)}: {named}" if named else duration(total)
