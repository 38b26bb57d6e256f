"""Does quickstart learn, and what does Resample on Correct do? Trains the recipe over seeds, with RoC and without.

    python benchmarks/learning.py --seeds 0 1 2 --runs runs/learning --picture docs/learning.png

One JSON object a line for every figure. Both variants of a seed go on from the same cold start. Runs that are complete
in the folder are read, not repeated, and a run that was stopped goes on where it stood. The picture needs the ``bench``
extra.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

from jaxrl.observe.report import SUMMARY_FILE
from jaxrl.observe.writers import read_metrics

VARIANTS = {"RoC": [], "no RoC": ["AlgorithmConfig.selection=first"]}
LAST_STEPS = 20
"""Steps of training episodes that the share of failed calls is averaged over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/learning"))
    parser.add_argument("--set", action="append", default=[], metavar="Section.field=value")
    parser.add_argument("--picture", type=pathlib.Path)
    parser.add_argument("--json", action="store_true", help="accepted for uniformity; the output is always JSON")
    options = parser.parse_args()
    folders = {
        (variant, seed): options.runs / f"{variant.replace(' ', '_')}_{seed}"
        for variant in VARIANTS
        for seed in options.seeds
    }
    for (variant, seed), folder in folders.items():
        overrides = [*options.set, f"TrainConfig.seed={seed}", f"DataConfig.seed={seed}"]
        branch(options.recipe, options.runs / f"cold_start_{seed}", folder, overrides)
        if not (folder / SUMMARY_FILE).exists():
            run("train", options.recipe, folder, [*overrides, *VARIANTS[variant]])
    for row in figures(folders):
        print(json.dumps(row), flush=True)
    if options.picture:
        draw(folders, options.picture)


def branch(recipe: str, cold: pathlib.Path, folder: pathlib.Path, overrides: list[str]) -> None:
    """Makes a run that goes on from a cold start; makes that first where it is not there, and keeps a run that is."""
    if folder.exists():
        return
    if not (cold / SUMMARY_FILE).exists():
        run("sft", recipe, cold, overrides)
    copy = folder.with_suffix(".tmp")
    shutil.copytree(cold, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SUMMARY_FILE))
    copy.rename(folder)


def run(verb: str, recipe: str, folder: pathlib.Path, overrides: list[str]) -> None:
    """One stage in its own process; goes on where the folder stands."""
    arguments = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "jaxrl.cli", verb, recipe, "--run", str(folder), *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr)


def figures(folders: dict[tuple[str, int], pathlib.Path]) -> list[dict[str, Any]]:
    """L1 lift of pass@1, L2 final pass@1, L3 and L4 failed calls in correct episodes, without RoC less with RoC.

    A figure holds where every seed meets the demand.
    """
    summaries = {key: json.loads((folder / SUMMARY_FILE).read_text()) for key, folder in folders.items()}
    with_roc = [summary for (variant, _), summary in summaries.items() if variant == "RoC"]
    lifts = [summary["pass_rate_after"] - summary["pass_rate_before"] for summary in with_roc]
    ends = [summary["pass_rate_after"] for summary in with_roc]
    return [
        figure("L1 lift of sampled pass@1 on unseen problems", lifts, "share", ">= 0.25", min(lifts) >= 0.25),
        figure("L2 sampled pass@1 at the end", ends, "share", ">= 0.80", min(ends) >= 0.80),
        *(
            figure(f"{name}, RoC off minus on", gaps, "share", "> 0", min(gaps) > 0)
            for name, gaps in (
                (f"L3 failed calls in correct training episodes, last {LAST_STEPS} steps", gap(folders, LAST_STEPS)),
                ("L4 the same, all steps", gap(folders, None)),
            )
        ),
        figure("seconds of training", [summary["seconds"] for summary in with_roc], "s", "<= 900", None),
        {"figure": "evaluations by seed", "value": [summary["evaluations"] for summary in with_roc]},
    ]


def figure(name: str, values: list[float], unit: str, demand: str, holds: bool | None) -> dict[str, Any]:
    """One row: the mean over the seeds, each seed's value, and whether every seed meets the demand."""
    rounded = [round(value, 4) for value in values]
    mean = round(sum(values) / len(values), 4)
    return {"figure": name, "value": mean, "by_seed": rounded, "unit": unit, "demand": demand, "holds": holds}


def gap(folders: dict[tuple[str, int], pathlib.Path], last: int | None) -> list[float]:
    """By seed: the share of failed calls without RoC less that with RoC."""
    shares = {variant: [failed_share(f, last) for (v, _), f in folders.items() if v == variant] for variant in VARIANTS}
    return [without - with_ for without, with_ in zip(shares["no RoC"], shares["RoC"], strict=True)]


def failed_share(folder: pathlib.Path, last: int | None) -> float:
    """Share of failed calls in a step's correct training episodes, mean over the last steps that had such calls."""
    shares = [
        row["tool_error_share_in_correct"] for row in read_metrics(folder, "rl") if "tool_error_share_in_correct" in row
    ]
    chosen = shares if last is None else shares[-last:]
    return sum(chosen) / len(chosen) if chosen else float("nan")


def draw(folders: dict[tuple[str, int], pathlib.Path], path: pathlib.Path) -> None:
    """Curves of training pass rate, evaluation, and failed calls in correct episodes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    _, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colours = {"RoC": "tab:blue", "no RoC": "tab:orange"}
    for (variant, seed), folder in folders.items():
        rows, evaluations = read_metrics(folder, "rl"), read_metrics(folder, "eval")
        first = min(row["step"] for row in rows) - 1
        label = variant if seed == min(s for _, s in folders) else None
        style = {"color": colours[variant], "alpha": 0.8, "linewidth": 1}
        left.plot(
            [e["step"] - first for e in evaluations],
            [e["pass_rate"] for e in evaluations],
            marker="o",
            label=label,
            **style,
        )
        points = [
            (row["step"] - first, row["tool_error_share_in_correct"])
            for row in rows
            if "tool_error_share_in_correct" in row
        ]
        right.plot(*zip(*points, strict=True), label=label, **style)
    left.set(title="pass@1 on unseen problems (sampled)", xlabel="reinforcement step", ylim=(0, 1))
    right.set(title="failed tool calls in correct training episodes", xlabel="reinforcement step", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    pyplot.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
