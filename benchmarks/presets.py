"""What every preset makes of the quickstart task: each goes on from the same cold start for the same few steps.

    python benchmarks/presets.py --seeds 0 1 2 --runs runs/presets

One JSON object a line for every preset, and a table in Markdown on standard error. Runs that are complete in the folder
are read, not repeated, and a run that was stopped goes on where it stood.
"""

import argparse
import json
import pathlib
import statistics
import sys
from typing import Any

from learning import branch, run

from jaxrl.observe.report import SUMMARY_FILE
from jaxrl.observe.writers import read_metrics

PRESETS = (
    *("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rstar2", "retool", "icepop", "fapo", "dars", "datamind", "verltool"),
    "ppo",
)
LAST_STEPS = 5
"""Steps at the end of training that lengths and shares are averaged over."""


JUDGE = pathlib.Path(__file__).resolve().with_name("judge.py")
NEEDED = {"fapo": [f"RewardConfig.judge={JUDGE}:failed_before_it_answered"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--presets", nargs="+", default=PRESETS, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--problems", type=int, default=8, help="problems a step; the recipe has 16")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/presets"))
    parser.add_argument("--set", action="append", default=[], metavar="Section.field=value")
    parser.add_argument("--json", action="store_true", help="accepted for uniformity; the output is always JSON")
    options = parser.parse_args()
    steps = [
        f"TrainConfig.steps={options.steps}",
        f"TrainConfig.problems={options.problems}",
        "TrainConfig.eval_every=0",
    ]
    rows = {name: [] for name in options.presets}
    for seed in options.seeds:
        overrides = [*options.set, f"TrainConfig.seed={seed}", f"DataConfig.seed={seed}"]
        cold = options.runs / f"cold_start_{seed}"
        for name in options.presets:
            folder = options.runs / f"{name}_{seed}"
            branch(options.recipe, cold, folder, overrides)
            if not (folder / SUMMARY_FILE).exists():
                run("train", f"{options.recipe}+{name}", folder, [*overrides, *steps, *NEEDED.get(name, [])])
            rows[name].append(of_run(folder))
    print(f"| preset | {' | '.join(next(iter(rows.values()))[0])} |", "|---" * 7 + "|", sep="\n", file=sys.stderr)
    for name, seeds in rows.items():
        columns = {key: [row[key] for row in seeds] for key in seeds[0]}
        print(json.dumps({"figure": f"preset {name}", "by_seed": columns}), flush=True)
        print(f"| `{name}` | {' | '.join(cell(values) for values in columns.values())} |", file=sys.stderr)


def of_run(folder: pathlib.Path) -> dict[str, float]:
    """The figures of one run; shares between 0 and 1, lengths in tokens."""
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    last = read_metrics(folder, "rl")[-LAST_STEPS:]

    def mean(key: str) -> float:
        return statistics.fmean(row[key] for row in last if key in row)

    return {
        "pass@1 before": summary["pass_rate_before"],
        "pass@1 after": summary["pass_rate_after"],
        "response tokens": mean("response_tokens"),
        "failed calls in correct": mean("tool_error_share_in_correct"),
        "groups kept": mean("select/groups_kept"),
        "trajectories kept": mean("select/kept") / mean("select/group_size"),
    }


def cell(values: list[Any]) -> str:
    """The seeds' values in one cell: shares as per cent, lengths as they are."""
    return " · ".join(f"{value:.0f}" if value > 1.5 else f"{100 * value:.1f}" for value in values)


if __name__ == "__main__":
    main()
