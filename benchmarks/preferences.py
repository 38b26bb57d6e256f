"""Does a policy learn from preferences alone? DPO on right and wrong episodes that the cold start itself played.

    python benchmarks/preferences.py --seeds 0 1 2 --runs runs/preferences

One JSON object a line. Of a seed: the cold start, one step of many groups whose episodes are the data, ``jaxrl prefer``
on them from the cold start's weights, and an evaluation on problems never played. Runs that are complete in the folder
are read, not repeated; cold starts of ``presets.py`` may be given with --cold-starts.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from typing import Any

from learning import branch, figure, run

from jaxrl.observe.report import SUMMARY_FILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--losses", nargs="+", default=["sigmoid"], metavar="NAME")
    parser.add_argument("--problems", type=int, default=128, help="groups that are played for the data")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/preferences"))
    parser.add_argument(
        "--cold-starts", type=pathlib.Path, help="folder with cold_start_SEED (default: that of --runs)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="Section.field=value")
    parser.add_argument("--json", action="store_true", help="accepted for uniformity; the output is always JSON")
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        overrides = [f"TrainConfig.seed={seed}", f"DataConfig.seed={seed}"]
        cold = (options.cold_starts or options.runs) / f"cold_start_{seed}"
        played = options.runs / f"played_{seed}"
        branch(options.recipe, cold, played, overrides)
        play = ["TrainConfig.steps=1", f"TrainConfig.problems={options.problems}", "TrainConfig.eval_every=0"]
        if not (played / SUMMARY_FILE).exists():
            run("train", options.recipe, played, [*overrides, *play])
        before = json.loads((played / SUMMARY_FILE).read_text())["pass_rate_before"]
        for loss in options.losses:
            folder = options.runs / f"{loss}_{seed}"
            data = [f"PreferConfig.data={played}", f"ModelConfig.path={cold / 'export'}", f"PreferConfig.loss={loss}"]
            if not (folder / SUMMARY_FILE).exists():
                run("prefer", options.recipe, folder, [*overrides, *data, *options.set])
            rows.append({"loss": loss, "seed": seed, "before": before, "after": evaluated(folder)} | held_out(folder))
            print(json.dumps(rows[-1]), flush=True)
    for loss in options.losses:
        lifts = [row["after"] - row["before"] for row in rows if row["loss"] == loss]
        print(json.dumps(figure(f"lift of sampled pass@1, {loss}", lifts, "share", ">= 0.15", min(lifts) >= 0.15)))


def evaluated(folder: pathlib.Path) -> float:
    """Sampled pass@1 of a run on problems never played."""
    command = [sys.executable, "-m", "jaxrl.cli", "eval", str(folder), "--json"]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return report["average"]["value"]


def held_out(folder: pathlib.Path) -> dict[str, Any]:
    """How often the preferred episode of a pair never trained on is the one that grew likelier, before and after."""
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    return {f"accuracy {when}": summary[when]["accuracy"] for when in ("before", "after")}


if __name__ == "__main__":
    main()
