"""What an advantage sees: the trajectories of one step and what became of them. Host side, numpy."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl.config import ConfigError
from jaxrl.records import Trajectory
from jaxrl.rl.trees import nodes_of, states_of, turns_of

_SEVERAL_AGENTS = "name an episode that several agents play in EnvConfig.joint_episode, such as 'draft_and_revise'"
_SUPPLIED_BY = {
    "turn_rewards": "reward single turns: name a component that does in RewardConfig.components",
    "greedy_rewards": "set AlgorithmConfig.greedy_baseline=True, which plays a greedy trajectory of every problem too",
    "values": "set CriticConfig.enabled=True, which trains a critic beside the policy",
    "square_sums": "set AlgorithmConfig.square_sums=True, which scores every token once more",
    "reference_ratios": "set AlgorithmConfig.reference_ratios=True, which scores every token under the reference",
    "hint_gains": "set AlgorithmConfig.hint to 'demonstration' or 'attempts', of which the policy is told",
    "roles": _SEVERAL_AGENTS,
    "episodes": _SEVERAL_AGENTS,
}
"""What to do about a field that may be missing."""

CONTENTS = ("states", "nodes", "logprobs")
"""Fields that follow from what was written."""


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """N trajectories that are trained on together. Groups may have any sizes, and any order.

    Trajectory i has T_i response tokens and K_i policy turns. A field that is None was not recorded; ``need`` reads
    those without which a method cannot do.

    Attributes:
        rewards: [N] float, of the whole trajectory.
        groups: [N]; trajectories with the same entry answer the same problem.
        masks: of each trajectory [T_i], 1 where the policy sampled the token.
        turns: of each [T_i] int, the policy turn that a token belongs to, from 0; -1 where the environment wrote it.
        turn_rewards: of each [K_i] float, what a turn earned by itself, apart from the reward of the whole.
        continues: of each [K_i] bool, False where the environment put another action in the place of the turn's, so
            that what comes after did not follow from it. None = always True.
        states: of each, K_i names of what the policy saw last before the turn; equal names = the same state.
        nodes: of each [K_i] int, the node of the tree of shared prefixes that the turn leads to: two trajectories have
            the same node where they are the same up to the end of that turn.
        components: [N] by name, the rewards that ``rewards`` is the weighted sum of; nan = it gave none.
        component_weights: of the components, by name; 1 for those left out.
        token_rewards: of each [T_i]; None = the reward stands on the last sampled token.
        logprobs: of each [T_i], by the policy that sampled.
        square_sums: of each [T_i], the sum of squared probabilities over the vocabulary, by the same policy.
        reference_ratios: [N], logarithm of the policy's probability over the reference's, summed over sampled tokens.
        hint_gains: of each [T_i], what a hint in its prompt adds to the log-probability under the weights that the step
            began with; None of one for which there is none.
        ratios: of each [T_i], importance weights of tokens of another policy. None = always 1.
        values: of each [T_i], a critic's estimate of what is still to come.
        greedy_rewards: [N], of a greedy trajectory of the same problem.
        roles: [N], the agent that wrote the trajectory. None = a single one.
        episodes: [N]; trajectories with the same entry were played against each other.
        trained: [N] bool; False = it counts in the mean of its group alone. None = all are trained on.
        memory: numbers by name that a method kept of the steps before.
    """

    rewards: np.ndarray
    groups: np.ndarray
    masks: Sequence[np.ndarray]
    turns: Sequence[np.ndarray] | None = None
    turn_rewards: Sequence[np.ndarray] | None = None
    continues: Sequence[np.ndarray] | None = None
    states: Sequence[Sequence[bytes]] | None = None
    nodes: Sequence[np.ndarray] | None = None
    components: Mapping[str, np.ndarray] | None = None
    component_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    token_rewards: Sequence[np.ndarray] | None = None
    logprobs: Sequence[np.ndarray] | None = None
    square_sums: Sequence[np.ndarray] | None = None
    reference_ratios: np.ndarray | None = None
    hint_gains: Sequence[np.ndarray | None] | None = None
    ratios: Sequence[np.ndarray] | None = None
    values: Sequence[np.ndarray] | None = None
    greedy_rewards: np.ndarray | None = None
    roles: np.ndarray | None = None
    episodes: np.ndarray | None = None
    trained: np.ndarray | None = None
    memory: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def by_group(self) -> Iterator[np.ndarray]:
        """Indices of the trajectories of each group."""
        return indices_of(self.groups)

    def need(self, field: str) -> Any:
        """A field that the calling method cannot do without.

        Raises:
            ConfigError: it is None; the message says what supplies it.
        """
        value = getattr(self, field)
        if value is None:
            raise ConfigError(f"this advantage needs {field}: {_SUPPLIED_BY.get(field, 'nothing recorded them')}")
        return value

    def rewards_by_token(self) -> list[np.ndarray]:
        """Of each trajectory [T_i] float64: the token rewards, or the reward of the whole on its last sampled token."""
        if self.token_rewards is not None:
            return [np.asarray(rewards, np.float64) for rewards in self.token_rewards]
        by_token = []
        for reward, mask in zip(self.rewards, self.masks, strict=True):
            values = np.zeros(len(mask))
            values[np.flatnonzero(mask)[-1:]] = reward
            by_token.append(values)
        return by_token

    def trained_masks(self) -> list[np.ndarray]:
        """``masks`` of the trajectories that are trained on; of the others zeros."""
        trained = np.ones(len(self.masks), bool) if self.trained is None else self.trained
        return [np.asarray(mask) * bool(flag) for mask, flag in zip(self.masks, trained, strict=True)]

    def on_turns(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of each trajectory [T_i] float32: values [K_i] of its policy turns, on the tokens of each; elsewhere 0."""
        return [
            np.where(turns >= 0, np.append(of_turn, 0.0)[turns], 0.0).astype(np.float32)
            for turns, of_turn in zip(self.need("turns"), values, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Which of what an advantage may ask for the trajectories of a run hold.

    Attributes:
        component_weights: the reward's components.
        turn_rewards: a component rewards single turns.
        greedy_rewards: a greedy trajectory of every problem is played.
        square_sums: every token is scored once more.
        reference_ratios: every token is scored under the reference.
        hint_gains: every token is scored by the policy with a hint and without.
        values: a critic estimates what is still to come.
        several_agents: the environment says who wrote a trajectory, and with whom it was played.
        contents: what was written is known of all of them, for ``CONTENTS``; of several processes each knows only what
            it played.
    """

    component_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    turn_rewards: bool = False
    greedy_rewards: bool = False
    square_sums: bool = False
    reference_ratios: bool = False
    hint_gains: bool = False
    values: bool = False
    several_agents: bool = False
    contents: bool = True


def of_trajectories(
    trajectories: Sequence[Trajectory],
    groups: np.ndarray,
    recorded: Recorded,
    memory: Mapping[str, float],
    values: Sequence[np.ndarray] | None = None,
) -> Outcomes:
    """What became of played trajectories.

    Args:
        trajectories: N of them.
        groups: [N].
        recorded: what they hold.
        memory: see ``Outcomes``.
        values: see ``Outcomes``; looked at where ``recorded`` has them.
    """
    policy_turns = [[turn for turn in trajectory.turns if turn.author == "policy"] for trajectory in trajectories]
    components = {
        name: np.array([trajectory.components.get(name, np.nan) for trajectory in trajectories])
        for name in recorded.component_weights
    }
    together = np.array([(group, one.episode) for group, one in zip(groups, trajectories, strict=True)], int)
    together = together.reshape(-1, 2)  # also of no trajectories
    rewards = np.array([trajectory.reward for trajectory in trajectories], np.float64)
    return Outcomes(
        rewards=rewards,
        groups=groups,
        masks=[trajectory.mask for trajectory in trajectories],
        turns=[turns_of(trajectory) for trajectory in trajectories],
        turn_rewards=[np.array([t.reward for t in turns]) for turns in policy_turns] if recorded.turn_rewards else None,
        continues=[np.array([not turn.replaced for turn in turns], bool) for turns in policy_turns],
        states=[states_of(trajectory) for trajectory in trajectories] if recorded.contents else None,
        nodes=nodes_of(trajectories) if recorded.contents else None,
        components=components or None,
        component_weights=recorded.component_weights,
        logprobs=[trajectory.logprobs for trajectory in trajectories] if recorded.contents else None,
        values=values if recorded.values else None,
        greedy_rewards=_greedy_rewards(trajectories, rewards, groups) if recorded.greedy_rewards else None,
        roles=np.array([one.role for one in trajectories]) if recorded.several_agents else None,
        episodes=np.unique(together, axis=0, return_inverse=True)[1].ravel() if recorded.several_agents else None,
        memory=memory,
    )


def _greedy_rewards(trajectories: Sequence[Trajectory], rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[N]; the mean of the group where a fault of ours spoiled the greedy trajectory."""
    greedy = np.array([t.greedy_reward if t.greedy_reward is not None else np.nan for t in trajectories])
    for rows in indices_of(groups):
        greedy[rows] = np.where(np.isnan(greedy[rows]), rewards[rows].mean(), greedy[rows])
    return greedy


def indices_of(names: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of the entries that share a name, for each name."""
    _, inverse, counts = np.unique(names, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    yield from np.split(order, np.cumsum(counts)[:-1]) if len(order) else ()
