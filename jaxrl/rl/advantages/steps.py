"""Credit for single turns: steps of one group that are alike are compared with each other, and added to the outcome."""

from collections.abc import Hashable, Sequence

import numpy as np

from jaxrl.rl.advantages.group import dr_grpo, grpo
from jaxrl.rl.advantages.returns import cut_sums, discounted_sums
from jaxrl.rl.outcomes import Outcomes, indices_of


def gigpo(
    outcomes: Outcomes, *, weight: float = 1.0, discount: float = 0.95, scale: bool = True, epsilon: float = 1e-6
) -> list[np.ndarray]:
    """A_episode + weight · A_step, steps taken in the same state compared with each other (GiGPO, arXiv 2505.10978).

    The return of a step is the discounted sum of rewards from its turn on, the outcome being earned by the last turn.
    A step whose state no other step of the group shares gets A_step = 0: unlike a trajectory that is alone in its
    group, it still has A_episode.

    Args:
        outcomes: ``turns`` and ``states``; ``turn_rewards`` where single turns earn something.
        weight: of the step's part.
        discount: of one turn.
        scale: divide by the std of the group and of the steps; False only centres.
        epsilon: beside the std.

    Returns:
        [T_i] float32 of each trajectory; 0 where the environment wrote the token.
    """
    states = outcomes.need("states")
    returns = [discounted_sums(rewards, discount) for rewards in _with_outcome(outcomes)]
    keys = [(group, state) for group, of_turns in zip(outcomes.groups, states, strict=True) for state in of_turns]
    steps = _compared(returns, keys, scale=scale, epsilon=epsilon)
    episodes = grpo(outcomes, epsilon=epsilon) if scale else dr_grpo(outcomes)
    return outcomes.on_turns([episode + weight * step for episode, step in zip(episodes, steps, strict=True)])


def step_and_episode(
    outcomes: Outcomes,
    *,
    step_weight: float = 1.0,
    episode_weight: float = 1.0,
    discount: float = 0.5,
    scale: bool = True,
    epsilon: float = 1e-6,
) -> list[np.ndarray]:
    """episode_weight · A_episode + step_weight · A_step, steps compared by their number (UI-S1, arXiv 2509.11543).

    The return of a step is the discounted sum of what turns earned from it on, cut where the environment put another
    action in the place of the policy's. A_episode normalises the outcome over all steps of the group, so that long
    trajectories weigh more in the mean, as the release does.

    Args:
        outcomes: ``turns`` and ``turn_rewards``; ``continues`` where actions were replaced.
        step_weight: of the step's part.
        episode_weight: of the outcome's part.
        discount: of one turn.
        scale: divide by the std.
        epsilon: beside the std.

    Returns:
        [T_i] float32 of each trajectory; 0 where the environment wrote the token.

    Raises:
        ConfigError: no component rewards single turns.
    """
    rewards = [np.asarray(earned, np.float64) for earned in outcomes.need("turn_rewards")]
    continues = outcomes.continues or [np.ones(len(earned), bool) for earned in rewards]
    returns = [cut_sums(earned, going_on, discount) for earned, going_on in zip(rewards, continues, strict=True)]
    numbers = [
        (group, step) for group, earned in zip(outcomes.groups, rewards, strict=True) for step in range(len(earned))
    ]
    steps = _compared(returns, numbers, scale=scale, epsilon=epsilon)
    outcome = [np.full(len(earned), reward) for reward, earned in zip(outcomes.rewards, rewards, strict=True)]
    episodes = _compared(outcome, [group for group, _ in numbers], scale=scale, epsilon=epsilon)
    return outcomes.on_turns(
        [episode_weight * episode + step_weight * step for episode, step in zip(episodes, steps, strict=True)]
    )


def turn_level(outcomes: Outcomes, *, outcome_weight: float = 1.0, epsilon: float = 1e-6) -> list[np.ndarray]:
    """The last turn gets the outcome's advantage, the others their own and outcome_weight times the outcome's.

    MT-GRPO (arXiv 2505.11821). The advantage of a turn is its reward normalised among the turns of the same number in
    the group. The paper has two turns, of which only the first earns something of its own.

    Args:
        outcomes: ``turns`` and ``turn_rewards``.
        outcome_weight: λ of the paper.
        epsilon: beside the std.

    Returns:
        [T_i] float32 of each trajectory; 0 where the environment wrote the token.

    Raises:
        ConfigError: no component rewards single turns.
    """
    rewards = [np.asarray(earned, np.float64) for earned in outcomes.need("turn_rewards")]
    numbers = [
        (group, step) for group, earned in zip(outcomes.groups, rewards, strict=True) for step in range(len(earned))
    ]
    values = []
    for outcome, own in zip(grpo(outcomes, epsilon=epsilon), _compared(rewards, numbers, epsilon=epsilon), strict=True):
        of_turns = own + outcome_weight * outcome
        of_turns[-1:] = outcome
        values.append(of_turns)
    return outcomes.on_turns(values)


def _with_outcome(outcomes: Outcomes) -> list[np.ndarray]:
    """Of each trajectory [K_i]: what turns earned, and the outcome on the last of them."""
    counts = [1 + int(turns.max(initial=-1)) for turns in outcomes.need("turns")]
    earned = [np.zeros(count) for count in counts]
    if outcomes.turn_rewards is not None:
        earned = [np.array(rewards, np.float64) for rewards in outcomes.turn_rewards]
    for reward, of_turns in zip(outcomes.rewards, earned, strict=True):
        of_turns[-1:] += reward
    return earned


def _compared(
    values: Sequence[np.ndarray], keys: Sequence[Hashable], *, scale: bool = True, epsilon: float = 1e-6
) -> list[np.ndarray]:
    """Values [K_i] of all trajectories, normalised among those with equal keys; 0 for one that has no equal."""
    flat = np.concatenate([np.zeros(0), *values])
    numbers: dict[Hashable, int] = {}
    normalised = np.zeros(len(flat))
    for rows in indices_of(np.array([numbers.setdefault(key, len(numbers)) for key in keys], int)):
        if len(rows) > 1 and np.ptp(flat[rows]):
            normalised[rows] = flat[rows] - flat[rows].mean()
            normalised[rows] /= flat[rows].std(ddof=1) + epsilon if scale else 1.0
    return np.split(normalised, np.cumsum([len(of_turns) for of_turns in values])[:-1]) if values else []
