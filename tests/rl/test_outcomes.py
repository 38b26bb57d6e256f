"""What an advantage sees of trajectories that were played."""

import dataclasses

import numpy as np
import pytest

from jaxrl.config import AlgorithmConfig, ConfigError
from jaxrl.records import Problem, StopReason, Trajectory, Turn
from jaxrl.rl import algorithm
from jaxrl.rl.advantages.roles import hierarchical
from jaxrl.rl.advantages.steps import step_and_episode
from jaxrl.rl.outcomes import Recorded, of_trajectories


def trajectory(sample: int, spans: list[list[int]], reward: float = 0.0, draw: int = 0, **fields) -> Trajectory:
    """Turns of the policy and of the tool by turns, each given by its tokens."""
    authors = ["policy" if number % 2 == 0 else "tool" for number in range(len(spans))]
    ends = np.cumsum([len(span) for span in spans]).tolist()
    turns = [Turn(end - len(span), end, author) for end, span, author in zip(ends, spans, authors, strict=True)]
    ids = np.array([token for span in spans for token in span], np.int32)
    mask = np.concatenate([np.full(len(s), a == "policy") for s, a in zip(spans, authors, strict=True)]).astype(np.int8)
    zeros = np.zeros(len(ids), np.float32)
    return Trajectory(
        problem=Problem("p", "1+1?", "2"),
        draw=draw,
        sample=sample,
        prompt_ids=np.array([9], np.int32),
        ids=ids,
        mask=mask,
        logprobs=zeros - 0.5 * mask,
        versions=zeros.astype(np.int32),
        turns=tuple(turns),
        stop_reason=StopReason.ANSWERED,
        reward=reward,
        **fields,
    )


PLAYED = [
    trajectory(0, [[1, 2], [7], [3]], reward=1.0, greedy_reward=0.5),
    trajectory(1, [[1, 2], [7], [4, 5]], greedy_reward=0.5),
    trajectory(2, [[6], [7], [3]], reward=1.0, greedy_reward=0.5),
    trajectory(0, [[1, 2]], draw=1),
]
GROUPS = np.array([0, 0, 0, 1])


def test_turns_states_and_the_tree_come_from_the_tokens() -> None:
    seen = of_trajectories(PLAYED, GROUPS, Recorded(), {})
    assert [turns.tolist() for turns in seen.turns] == [[0, 0, -1, 1], [0, 0, -1, 1, 1], [0, -1, 1], [0, 0]]
    first, second, third, other = seen.states
    assert first == second == third and first[0] == other[0] and first[0] != first[1]
    nodes = [path.tolist() for path in seen.nodes]
    assert nodes[0][0] == nodes[1][0] and nodes[0][1] != nodes[1][1]  # one first turn, two second ones
    assert nodes[2][0] != nodes[0][0] and nodes[2][1] != nodes[0][1]  # the same second turn after another first one
    assert nodes[3][0] not in nodes[0] + nodes[1] + nodes[2]  # the same tokens for another problem
    assert [reward.tolist() for reward in seen.rewards_by_token()][:2] == [[0, 0, 0, 1], [0, 0, 0, 0, 0]]


def test_a_value_of_a_turn_lies_on_the_tokens_the_policy_wrote_in_it() -> None:
    seen = of_trajectories(PLAYED, GROUPS, Recorded(), {})
    on_tokens = seen.on_turns([np.array([1.0, 2.0]), np.array([3.0, 4.0]), np.array([5.0, 6.0]), np.array([7.0])])
    assert [values.tolist() for values in on_tokens] == [[1, 1, 0, 2], [3, 3, 0, 4, 4], [5, 0, 6], [7, 7]]


def test_a_spoiled_greedy_trajectory_is_replaced_by_the_mean_of_the_group() -> None:
    played = [*PLAYED[:3], trajectory(0, [[1]], reward=1.0, draw=1), trajectory(1, [[1]], draw=1)]
    seen = of_trajectories(played, np.array([0, 0, 0, 1, 1]), Recorded(greedy_rewards=True), {})
    assert seen.greedy_rewards.tolist() == [0.5] * 5
    assert of_trajectories(PLAYED, GROUPS, Recorded(), {}).greedy_rewards is None


def test_components_are_nan_where_they_had_nothing_to_say() -> None:
    played = [trajectory(0, [[1]], components={"correct": 1.0}), trajectory(1, [[1]], components={})]
    seen = of_trajectories(played, np.zeros(2, int), Recorded(component_weights={"correct": 2.0}), {})
    np.testing.assert_array_equal(seen.components["correct"], [1.0, np.nan])
    assert seen.component_weights == {"correct": 2.0}


@pytest.mark.parametrize("advantage", ["gae", "hierarchical", "optimal_token_baseline", "remax", "turn_level"])
def test_a_run_that_cannot_supply_what_its_advantage_needs_does_not_start(advantage: str) -> None:
    with pytest.raises(ConfigError, match=f"AlgorithmConfig.advantage='{advantage}': this advantage needs"):
        algorithm.check(AlgorithmConfig(advantage=advantage), Recorded())


def test_a_kl_in_the_reward_needs_an_advantage_that_sees_rewards() -> None:
    recorded = Recorded(component_weights={"correct": 1.0})
    charged = {"kl_coefficient": 0.1, "kl_placement": "reward"}
    algorithm.check(AlgorithmConfig(advantage="gdpo"), recorded)
    algorithm.check(AlgorithmConfig(advantage="gigpo", **charged), recorded)
    with pytest.raises(ConfigError, match="advantage='gdpo' passes over the KL"):
        algorithm.check(AlgorithmConfig(advantage="gdpo", **charged), recorded)


@pytest.mark.parametrize("advantage", ["rae", "gigpo", "tree_depth", "tree_sibling", "reinforce_plus_plus", "max_rl"])
def test_what_any_run_supplies_is_enough(advantage: str) -> None:
    algorithm.check(AlgorithmConfig(advantage=advantage), Recorded())
    algorithm.check(AlgorithmConfig(advantage="remax"), Recorded(greedy_rewards=True))
    algorithm.check(AlgorithmConfig(advantage="optimal_token_baseline"), Recorded(square_sums=True))
    algorithm.check(AlgorithmConfig(advantage="gae"), Recorded(values=True))
    algorithm.check(AlgorithmConfig(advantage="online_dpo"), Recorded(reference_ratios=True))


@pytest.mark.parametrize(
    ("recorded", "setting"),
    [
        (Recorded(values=True), "CriticConfig.enabled"),
        (Recorded(greedy_rewards=True), "AlgorithmConfig.greedy_baseline"),
        (Recorded(square_sums=True), "AlgorithmConfig.square_sums"),
        (Recorded(reference_ratios=True), "AlgorithmConfig.reference_ratios"),
    ],
)
def test_what_an_advantage_passes_over_is_not_computed_for_it(recorded: Recorded, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting}=True is for advantages, but .*'grpo' passes it over"):
        algorithm.check(AlgorithmConfig(), recorded)


def test_a_length_is_not_counted_twice() -> None:
    with pytest.raises(ConfigError, match="'sequence_sum' counts the length of a sequence a second time"):
        algorithm.check(AlgorithmConfig(loss="luspo", aggregation="sequence_sum"), Recorded())
    algorithm.check(AlgorithmConfig(loss="luspo", aggregation="sequence"), Recorded())


def test_a_replaced_action_cuts_the_returns_of_the_turns_before_it() -> None:
    """UI-S1's worked numbers: what a turn that was replaced led to is credited to no turn before."""
    turns = [[1], [7], [2], [7], [3]]
    earned = {0: 1.0, 2: 0.2, 4: 1.0}

    def played(sample: int, replaced: int | None) -> Trajectory:
        one = trajectory(sample, turns)
        marked = (
            dataclasses.replace(turn, reward=earned.get(number, 0.0), replaced=number == replaced)
            for number, turn in enumerate(one.turns)
        )
        return dataclasses.replace(one, turns=tuple(marked))

    seen = of_trajectories([played(0, 2), played(1, None)], np.zeros(2, int), Recorded(turn_rewards=True), {})
    got = step_and_episode(seen, scale=False, episode_weight=0.0)
    returns = np.array([[1.0, 0.2, 1.0], [1.35, 0.7, 1.0]])
    np.testing.assert_allclose(np.stack(got)[:, ::2], returns - returns.mean(axis=0), atol=1e-6)


def test_agents_that_played_together_are_those_of_one_group_and_episode() -> None:
    played = [
        dataclasses.replace(one, role=role, episode=episode)
        for one, role, episode in zip(PLAYED, ("proposer", "solver", "solver", "solver"), (0, 0, 1, 1), strict=True)
    ]
    seen = of_trajectories(played, GROUPS, Recorded(several_agents=True), {})
    assert seen.roles.tolist() == ["proposer", "solver", "solver", "solver"]
    assert len(set(seen.episodes.tolist())) == 3 and seen.episodes[2] != seen.episodes[3]
    np.testing.assert_allclose(hierarchical(seen).values, [one.reward for one in PLAYED])  # nobody had the same task
    assert of_trajectories(played, GROUPS, Recorded(), {}).roles is None
