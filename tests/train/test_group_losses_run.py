"""Whole runs of what compares the trajectories of a group with each other: two steps, whose numbers are worked out.

Before the first update the policy is the one that sampled, and the reference, so every ratio is 1 and the loss is a
function of the rewards that the run wrote to disk.
"""

import io
import itertools
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from jaxrl import config as configuration
from jaxrl.observe.progress import Progress
from jaxrl.observe.traces import read_episodes
from jaxrl.observe.writers import read_metrics
from jaxrl.records import Trajectory
from jaxrl.train import experiment

PAID = "def paid(graded, *, ways: int = 3):\n    return float(graded.trajectory.ids.sum() % ways)\n"
COMMON = (
    *("SftConfig.steps=0", "TrainConfig.steps=2", "TrainConfig.eval_every=0", "TrainConfig.prefetch_groups=0"),
    *("TrainConfig.problems=2", "TrainConfig.samples=4", "TrainConfig.row_tokens=96", "CheckpointConfig.every=9"),
    *("EngineConfig.max_response_tokens=24", "AlgorithmConfig.keep=0", "AlgorithmConfig.reject_equal=False"),
    *("AlgorithmConfig.kl_coefficient=0", "EvalConfig.samples=1", "EvalConfig.k=(1,)"),
)

Groups = list[list[Trajectory]]


def rewards(group: Sequence[Trajectory]) -> np.ndarray:
    return np.array([one.reward for one in group])


def gvpo(groups: Groups, row: dict) -> float:
    """½ of the mean square of what is above the mean of its group."""
    return 0.5 * float(np.mean([(rewards(group) - rewards(group).mean()) ** 2 for group in groups]))


def flowrl(groups: Groups, row: dict) -> float:
    """A tenth of 15² times the mean square advantage, the rest being the demonstrations'."""
    spread = [(rewards(g) - rewards(g).mean()) / (rewards(g).std(ddof=1) + 1e-6) for g in groups]
    return 0.1 * 15**2 * float(np.mean(np.square(spread))) + 0.9 * row["nll"]


def a_star_po(groups: Groups, row: dict) -> float:
    """The mean square of the reward less ½ ln of the mean of exp(2 reward) over its group."""
    values = [0.5 * np.log(np.mean(np.exp(rewards(group) / 0.5))) for group in groups]
    return float(np.mean([(rewards(group) - value) ** 2 for group, value in zip(groups, values, strict=True)]))


def online_dpo(groups: Groups, row: dict) -> float:
    """-Σ A ln p over the number of trajectories, A = beta / 2 for every pair won or lost, of n / pairs."""
    total = 0.0
    for group in groups:
        pairs = [(a, b) for a, b in itertools.permutations(group, 2) if a.reward > b.reward]
        whole = [float(a.logprobs.sum() - b.logprobs.sum()) for a, b in pairs]
        total -= 0.05 * sum(whole) * len(group) / max(len(pairs), 1)
    return total / sum(map(len, groups))


RUNS: dict[str, tuple[Callable[[Groups, dict], float], tuple[str, ...]]] = {
    "gvpo": (
        gvpo,
        ("AlgorithmConfig.loss=gvpo", "AlgorithmConfig.advantage=dr_grpo", "AlgorithmConfig.aggregation=sequence"),
    ),
    "flowrl": (
        flowrl,
        (
            *("AlgorithmConfig.loss=flowrl", "AlgorithmConfig.aggregation=sequence", "TrainConfig.packing=tree"),
            "MixConfig.demonstrations=any",
        ),
    ),
    "a_star_po": (
        a_star_po,
        (
            *("AlgorithmConfig.loss=a_star_po", "AlgorithmConfig.advantage=optimal_value"),
            *("AlgorithmConfig.reference_ratios=True", "AlgorithmConfig.aggregation=sequence"),
        ),
    ),
    "online_dpo": (
        online_dpo,
        (
            *("AlgorithmConfig.loss=reinforce", "AlgorithmConfig.advantage=online_dpo"),
            *("AlgorithmConfig.reference_ratios=True", "AlgorithmConfig.aggregation=sequence_sum"),
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_first_loss_is_what_the_rewards_on_disk_make_it(
    tiny_overrides: tuple[str, ...], tmp_path: pathlib.Path, name: str
) -> None:
    expected, settings = RUNS[name]
    rows, groups = run(tmp_path, (*tiny_overrides, *COMMON, *settings))
    assert len(rows) == 2 and all(0 < row["grad_norm"] < np.inf for row in rows)
    assert rows[0]["ratio"] == pytest.approx(1, abs=1e-4)
    assert len({one.reward for group in groups for one in group}) > 1
    assert rows[0]["loss"] == pytest.approx(expected(groups, rows[0]), rel=1e-3)


@pytest.mark.slow
def test_a_policy_learns_from_itself_with_a_demonstration_in_its_prompt(
    tiny_overrides: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    own = "AlgorithmConfig.advantage=self_distillation", "AlgorithmConfig.hint=demonstration"
    wide = "AlgorithmConfig.loss=reinforce", "TrainConfig.row_tokens=256"
    rows, _ = run(tmp_path, (*tiny_overrides, *COMMON, *own, *wide))
    assert len(rows) == 2 and all(row["hinted_share"] == 1 and 0 < row["grad_norm"] < np.inf for row in rows)


@pytest.mark.slow
def test_several_agents_play_and_are_compared_with_their_like(
    tiny_overrides: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    joint = ("EnvConfig.joint_episode=draft_and_revise", "AlgorithmConfig.advantage=hierarchical")
    settings = ("AlgorithmConfig.loss=reinforce",)
    # A reviser's question holds the draft's answer.
    longer = "EngineConfig.max_prompt_tokens=120", "TrainConfig.row_tokens=144"
    rows, groups = run(tmp_path, (*tiny_overrides, *COMMON, *joint, *settings, *longer))
    assert [len(group) for group in groups] == [12, 12] and len(rows) == 2
    total = tokens = 0.0
    for group in groups:
        for one in group:
            same = [o for o in group if o.role == one.role and (one.role == "proposer" or o.episode == one.episode)]
            total -= (one.reward - rewards(same).mean()) * float(one.logprobs.sum())
            tokens += one.mask.sum()
    assert rows[0]["loss"] == pytest.approx(total / tokens, rel=1e-3)


def run(folder: pathlib.Path, overrides: Sequence[str]) -> tuple[list[dict], Groups]:
    """A run's rows of reinforcement, and the groups of its first step, by draw."""
    (folder / "paid.py").write_text(PAID)
    paid = f"RewardConfig.components={{'{folder}/paid.py:paid': 1.0}}"
    config = configuration.load("", [*overrides, paid])
    with Progress("tiny", file=io.StringIO(), live=False) as view:
        experiment.train(config, folder / "run", view)
    episodes = read_episodes(min((folder / "run" / "episodes").glob("rl_*.jsonl")))
    by_draw = itertools.groupby(sorted(episodes, key=lambda one: one.draw), key=lambda one: one.draw)
    return read_metrics(folder / "run", "rl"), [list(group) for _, group in by_draw]
