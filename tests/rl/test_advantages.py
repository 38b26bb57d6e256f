"""Advantages against worked numbers, and what holds for all of them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.config import ConfigError
from jaxrl.rl.advantages import ADVANTAGES
from jaxrl.rl.advantages.gae import decay_of_length, gae, pf_ppo
from jaxrl.rl.advantages.group import dr_grpo, gpg, grpo, max_rl, opo, pass_at_k, rloo
from jaxrl.rl.advantages.optimal_value import optimal_value
from jaxrl.rl.advantages.preferred import nash_md, online_dpo, xpo
from jaxrl.rl.advantages.returns import cut_sums, discounted_sums
from jaxrl.rl.advantages.roles import hierarchical
from jaxrl.rl.advantages.running import Remembered, rae, remax
from jaxrl.rl.advantages.steps import gigpo, step_and_episode, turn_level
from jaxrl.rl.advantages.taught import self_distillation
from jaxrl.rl.advantages.tree import tree_depth, tree_sibling
from jaxrl.rl.outcomes import Outcomes

EIGHT = np.array([1, 0, 0, 1, 1, 0, 0, 0], np.float64)


def outcomes(rewards: Any, groups: Any = None, **fields: Any) -> Outcomes:
    """One group unless said otherwise, of trajectories of a single token."""
    rewards = np.asarray(rewards, np.float64)
    groups = np.zeros(len(rewards), int) if groups is None else np.asarray(groups)
    return Outcomes(**{"rewards": rewards, "groups": groups, "masks": [np.ones(1)] * len(rewards)} | fields)


def turns_of_one_token(counts: list[int]) -> list[np.ndarray]:
    """So many policy turns of one token each, a token of the environment behind each but the last."""
    return [np.array([k if even == 0 else -1 for k in range(count) for even in (0, 1)][:-1], int) for count in counts]


def complete(rewards: np.ndarray, groups: np.ndarray, seed: int, turns_of_each: int = 0) -> Outcomes:
    """Everything any advantage asks for, made up; trajectories of 1 to 3 turns unless said otherwise."""
    rng = np.random.default_rng(seed)
    counts = [turns_of_each] * len(rewards) if turns_of_each else rng.integers(1, 4, len(rewards)).tolist()
    turns = turns_of_one_token(counts)
    masks = [(of >= 0).astype(np.int8) for of in turns]
    lengths = [len(mask) for mask in masks]
    return Outcomes(
        rewards=rewards,
        groups=groups,
        masks=masks,
        turns=turns,
        turn_rewards=[rng.normal(size=count) for count in counts],
        states=[[bytes([k, rng.integers(2)]) for k in range(count)] for count in counts],
        nodes=[100 * groups[i] + 10 * np.arange(count) + rng.integers(2) for i, count in enumerate(counts)],
        components={"a": rewards, "b": rng.normal(size=len(rewards))},
        component_weights={"b": 0.5},
        logprobs=[-rng.random(length) for length in lengths],
        square_sums=[rng.random(length) for length in lengths],
        reference_ratios=rng.normal(size=len(rewards)),
        hint_gains=[rng.normal(size=length) if rng.random() < 0.7 else None for length in lengths],
        values=[rng.normal(size=length) for length in lengths],
        greedy_rewards=rng.normal(size=len(rewards)),
        roles=rng.choice(["proposer", "solver"], len(rewards)),
        episodes=rng.integers(0, 2, len(rewards)),
        memory={"hierarchical/proposer": 1.0},
    )


def by_token(name: str, given: Outcomes) -> list[np.ndarray]:
    values = ADVANTAGES[name](given)
    values = values.values if isinstance(values, Remembered) else values
    return [np.broadcast_to(value, len(mask)) * mask for value, mask in zip(values, given.masks, strict=True)]


def reordered(given: Outcomes, order: np.ndarray) -> Outcomes:
    fields = {}
    for name, value in vars(given).items():
        if name in ("component_weights", "memory") or value is None:
            continue
        if name == "components":
            fields[name] = {component: rewards[order] for component, rewards in value.items()}
        else:
            fields[name] = value[order] if isinstance(value, np.ndarray) else [value[i] for i in order]
    return Outcomes(**fields, component_weights=given.component_weights, memory=given.memory)


@pytest.mark.parametrize(
    ("positives", "expected"),
    [
        (1, (3.75, -0.25)),
        (2, (2.5617, -0.3660)),
        (4, (1.6771, -0.5590)),
        (8, (0.9682, -0.9682)),
        (14, (0.3660, -2.5617)),
    ],
)
def test_grpo_of_sixteen(positives: int, expected: tuple[float, float]) -> None:
    got = grpo(outcomes(np.arange(16) < positives))
    np.testing.assert_allclose([got[0], got[-1]], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [(grpo, (1.2076, -0.7246)), (dr_grpo, (0.625, -0.375)), (rloo, (0.7143, -0.4286)), (max_rl, (1.6667, -1))],
)
def test_worked_group_of_eight(estimator: Any, expected: tuple[float, float]) -> None:
    np.testing.assert_allclose(estimator(outcomes(EIGHT))[:2], expected, atol=1e-4)


def test_opo_weighs_the_baseline_by_length() -> None:
    masks = [np.ones(10 * length) for length in range(1, 9)]
    np.testing.assert_allclose(opo(outcomes(EIGHT, masks=masks)), EIGHT - 0.2778, atol=1e-4)


def test_pass_at_k_rewards_the_best_alone() -> None:
    got = pass_at_k(outcomes([0.9, 0.4, 0.1, 0.2]))
    np.testing.assert_allclose(got, [1.4049, 0, 0, 0], atol=1e-4)
    np.testing.assert_allclose(pass_at_k(outcomes([0.9, 0.4, 0.1, 0.2]), scale=False), [0.5, 0, 0, 0])
    assert not pass_at_k(outcomes([1, 1, 0])).any() and not pass_at_k(outcomes([1])).any()


def test_online_dpo_is_the_slope_of_the_loss_of_all_pairs() -> None:
    """By differences: two groups of three, of one of which all earned the same."""
    rewards, ratios = np.array([1.0, 0.0, 0.5, 1.0, 0.0, 0.0, 2.0, 2.0, 2.0]), np.linspace(-2, 3, 9)[::-1] ** 2

    def loss(ratios: np.ndarray) -> float:
        of_groups = []
        for rows in np.arange(6).reshape(2, 3):
            pairs = [(i, j) for i in rows for j in rows if rewards[i] > rewards[j]]
            of_groups.append(np.mean([np.logaddexp(0, -0.7 * (ratios[i] - ratios[j])) for i, j in pairs]))
        return 3 * sum(of_groups) / 9  # a mean over groups, the third of which has no pair

    got = online_dpo(outcomes(rewards, np.repeat([0, 1, 2], 3), reference_ratios=ratios), beta=0.7)
    step = 1e-5 * np.eye(9)
    slopes = [(loss(ratios + one) - loss(ratios - one)) / 2e-5 for one in step]
    np.testing.assert_allclose(got / 9, np.negative(slopes), rtol=1e-4, atol=1e-7)


def test_xpo_pushes_down_what_the_reference_would_write() -> None:
    """Over all answers there are, each with its chance: the gradient of alpha · the mean ln p under the reference."""
    logits, reference = jnp.array([0.4, -0.2, 1.0]), np.array([0.5, 0.3, 0.2])
    policy = np.asarray(jax.nn.softmax(logits), np.float64)
    given = outcomes([1.0, 0.0, 0.5], reference_ratios=np.log(policy / reference))
    term = xpo(given, alpha=0.2) - online_dpo(given)
    got = -policy @ (term[:, None] * np.asarray(jax.jacobian(jax.nn.log_softmax)(logits)))
    wanted = jax.grad(lambda x: 0.2 * jnp.asarray(reference) @ jax.nn.log_softmax(x))(logits)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    far = outcomes([1.0, 1.0], reference_ratios=np.array([-50.0, 0.0]))
    np.testing.assert_allclose(xpo(far, alpha=0.1, cap=3.0), [-0.3, -0.1], rtol=1e-6)


def test_nash_md_plays_against_the_others_of_its_group_as_the_mixture_would_write_them() -> None:
    rewards, ratios = [1.0, 0.0, 3.0, 2.0], [0.5, -1.0, 0.25, 7.0]
    got = nash_md(outcomes(rewards, [0, 0, 0, 1], reference_ratios=np.array(ratios)), beta=0.2, mixture=0.7)
    for own in range(3):
        wins = total = 0.0
        for other in range(3):
            if other != own:
                chance = 1 / (1 + math.exp(rewards[other] - rewards[own]))
                wins += math.exp(-0.7 * ratios[other]) * chance
                total += math.exp(-0.7 * ratios[other])
        assert got[own] == pytest.approx(wins / total - 0.5 - 0.2 * ratios[own], rel=1e-5)
    assert got[3] == pytest.approx(-0.2 * 7.0, rel=1e-6)
    with pytest.raises(ConfigError, match="mixture=1.5 must lie between 0 and 1"):
        nash_md(outcomes([1.0, 0.0], reference_ratios=np.zeros(2)), mixture=1.5)


def test_the_optimal_value_is_that_of_the_reference_whoever_sampled() -> None:
    """Four trajectories in the proportions of the policy; the value is a sum over what the reference would write."""
    policy, reference = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    rewards, answers = np.array([0.0, 1.0, 0.5]), [0, 0, 1, 2]
    given = outcomes(rewards[answers], reference_ratios=np.log(policy / reference)[answers])
    value = 0.3 * math.log(float(reference @ np.exp(rewards / 0.3)))
    np.testing.assert_allclose(optimal_value(given, beta=0.3), rewards[answers] - value, rtol=1e-5)
    with pytest.raises(ConfigError, match="beta=0 must be above 0"):
        optimal_value(given, beta=0)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, [1 / 2.25, 4 / 2.25, 4 / 2.25, 0]),
        ({"power": 1.0}, [0.8, 1.6, 1.6, 0]),
        ({"weight": "ends"}, [0, 4 / 2, 4 / 2, 0]),
        ({"weight": "best"}, [0.1 / 0.175, 0.1 / 0.175, 0.4 / 0.175, 0.1 / 0.175]),
    ],
)
def test_pf_ppo_counts_a_trajectory_by_its_reward(settings: dict[str, Any], weights: list[float]) -> None:
    given = complete(np.array([1.0, -2.0, 2.0, 0.0]), np.zeros(4, int), 3)
    plain, weighted = gae(given, decay=0.9), pf_ppo(given, decay=0.9, **settings)
    for values, each, weight in zip(weighted, plain, weights, strict=True):
        np.testing.assert_allclose(values, weight * each, rtol=1e-5)
    nothing = dataclasses.replace(given, rewards=np.zeros(4))
    for values, each in zip(pf_ppo(nothing), gae(nothing), strict=True):
        np.testing.assert_array_equal(values, each)


def test_self_distillation_has_the_gradient_of_the_kl_to_the_policy_with_a_hint() -> None:
    """In expectation over all tokens the policy may write; what a tool wrote, and what was given no hint, has none."""
    logits, told = jnp.array([0.3, -0.5, 1.0]), np.asarray(jax.nn.log_softmax(jnp.array([-1.0, 0.4, 0.2])))
    own = np.asarray(jax.nn.log_softmax(logits))
    values = np.concatenate(self_distillation(outcomes([1.0, 0.0, 0.0], hint_gains=list((told - own)[:, None]))))
    got = -(np.exp(own) * values) @ np.asarray(jax.jacobian(jax.nn.log_softmax)(logits))
    wanted = jax.grad(lambda x: jax.nn.softmax(x) @ (jax.nn.log_softmax(x) - told))(logits)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    given = outcomes([1, 0], masks=[np.array([1, 0, 1]), np.ones(1)], hint_gains=[np.array([0.5, 9.0, -0.5]), None])
    assert [values.tolist() for values in self_distillation(given)] == [[0.5, 0.0, -0.5], [0.0]]


def test_gpg_makes_up_for_rewards_of_zero() -> None:
    np.testing.assert_allclose(gpg(outcomes(EIGHT))[:2], [8 / 3 * 0.625, -8 / 3 * 0.375], rtol=1e-6)


def test_returns_are_cut_where_an_action_was_replaced() -> None:
    np.testing.assert_allclose(cut_sums(np.array([1, 0.2, 1]), np.array([True, False, True]), 0.5), [1, 0.2, 1])
    np.testing.assert_allclose(cut_sums(np.array([1, 0.2, 1]), np.ones(3, bool), 0.5), [1.35, 0.7, 1])
    np.testing.assert_allclose(discounted_sums(np.array([1, 0.2, 1]), 0.5), [1.35, 0.7, 1])
    assert len(discounted_sums(np.zeros(0), 0.5)) == 0


def test_steps_are_compared_by_their_number() -> None:
    turns = turns_of_one_token([2, 2, 1])
    earned = [np.array([1.0, 0.0]), np.array([0.0, 0.0]), np.array([0.5])]
    given = outcomes([1, 0, 0], masks=[of >= 0 for of in turns], turns=turns, turn_rewards=earned)
    got = step_and_episode(given, scale=False, discount=0.5)
    # Outcomes over all steps: mean of (1, 1, 0, 0, 0) is 0.4. First steps: 1, 0, 0.5. Second steps: 0, 0.
    for values, expected in zip(got, [[0.6 + 0.5, 0, 0.6], [-0.4 - 0.5, 0, -0.4], [-0.4]], strict=True):
        np.testing.assert_allclose(values, expected, rtol=1e-6)
    cut = outcomes([0, 0], turns=turns[:2], turn_rewards=[np.array([0.0, 1.0]), np.zeros(2)], masks=given.masks[:2])
    cut = Outcomes(**vars(cut) | {"continues": [np.array([False, True]), np.ones(2, bool)]})
    assert [values[0] for values in step_and_episode(cut)] == [0.0, 0.0]


def test_gigpo_compares_steps_taken_in_the_same_state() -> None:
    turns = turns_of_one_token([2, 2, 1])
    given = outcomes(
        [1, 0, 0],
        masks=[of >= 0 for of in turns],
        turns=turns,
        states=[[b"start", b"seen"], [b"start", b"seen"], [b"start"]],
    )
    got = gigpo(given, discount=0.5, scale=False)
    # From the start: returns 0.5, 0, 0 with mean 1/6; where "seen": 1, 0 with mean 1/2. Outcomes have mean 1/3.
    expected = [[2 / 3 + 1 / 3, 0, 2 / 3 + 0.5], [-1 / 3 - 1 / 6, 0, -1 / 3 - 0.5], [-1 / 3 - 1 / 6]]
    for values, of in zip(got, expected, strict=True):
        np.testing.assert_allclose(values, of, rtol=1e-6)
    elsewhere = Outcomes(**vars(given) | {"states": [[b"a", b"b"], [b"c", b"d"], [b"e"]]})
    np.testing.assert_allclose([values[0] for values in gigpo(elsewhere)], grpo(given))


def test_turn_rewards_reach_all_turns_but_the_last() -> None:
    turns = turns_of_one_token([2, 2])
    earned = [np.array([1.0, 5.0]), np.array([0.0, 0.0])]
    given = outcomes([0, 1], masks=[of >= 0 for of in turns], turns=turns, turn_rewards=earned)
    outcome = grpo(given)
    got = turn_level(given, outcome_weight=0.5)
    np.testing.assert_allclose(got[0], [0.70711 + 0.5 * outcome[0], 0, outcome[0]], atol=1e-4)
    np.testing.assert_allclose(got[1], [-0.70711 + 0.5 * outcome[1], 0, outcome[1]], atol=1e-4)


def branched() -> Outcomes:
    """Two first turns; the first of them went on in two ways."""
    turns = turns_of_one_token([2, 2, 1])
    nodes = [np.array([0, 1]), np.array([0, 2]), np.array([3])]
    return outcomes([1, 0, 0], masks=[of >= 0 for of in turns], turns=turns, nodes=nodes)


def test_a_tree_by_depth() -> None:
    got = tree_depth(branched())
    # Depth 0 has nodes worth 0.5 and 0, depth 1 has nodes worth 1 and 0: each ± 1 / √2 of the unbiased std.
    for values, expected in zip(got, [[0.7071, 0, 0.7071], [0.7071, 0, -0.7071], [-0.7071]], strict=True):
        np.testing.assert_allclose(values, expected, atol=1e-4)
    np.testing.assert_allclose(tree_depth(branched(), once=True)[0], [0.7071 / 2, 0, 0.7071], atol=1e-4)
    assert np.abs(tree_depth(branched(), clip=0.5)[0]).max() == 0.5


def test_a_tree_by_siblings() -> None:
    got = tree_sibling(branched())
    for values, expected in zip(got, [[0.5 - 1 / 3, 0, 0.5], [0.5 - 1 / 3, 0, -0.5], [-1 / 3]], strict=True):
        np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_allclose([values.sum() for values in got], dr_grpo(branched()), rtol=1e-6)


def test_roles_are_compared_where_they_had_the_same_task() -> None:
    given = outcomes(
        [1, 0, 3, 5, 7, 9],
        roles=np.array(["proposer", "proposer", "solver", "solver", "solver", "solver"]),
        episodes=np.array([0, 1, 0, 0, 1, 1]),
    )
    np.testing.assert_allclose(hierarchical(given).values, [0.5, -0.5, -1, 1, -1, 1])


def test_lambda_grows_with_the_sampled_length() -> None:
    """Of 100 sampled tokens λ = 1 - 1 / (0.05 · 100) = 0.8; tool output does not make it longer."""
    assert decay_of_length(np.repeat([1, 0], 100), 0.05) == pytest.approx(0.8)
    assert decay_of_length(np.ones(20), 0.05) == decay_of_length(np.ones(3), 0.05) == 0
    draw = np.random.default_rng(0)
    masks = [np.ones(30), np.repeat([1, 0, 1], [30, 5, 10])]
    fields = {"masks": masks, "values": [draw.normal(size=len(mask)) for mask in masks]}
    both = gae(outcomes([1, 0], **fields), length_share=0.05, whiten=False)
    for index, decay in enumerate((1 - 1 / 1.5, 0.5)):
        np.testing.assert_allclose(both[index], gae(outcomes([1, 0], **fields), decay=decay, whiten=False)[index])
    with pytest.raises(ConfigError, match="takes the place of decay"):
        gae(outcomes([1, 0], **fields), length_share=0.05, decay=0.9)


def test_the_running_mean_of_each_role_is_kept() -> None:
    given = outcomes([1, 1, -1], roles=np.array(["x", "x", "o"]))
    first = rae(given, decay=0.75)
    np.testing.assert_allclose(first.values, [0.75, 0.75, -0.75])
    assert first.memory == {"rae/x": 0.25, "rae/o": -0.25}
    second = rae(Outcomes(**vars(given) | {"memory": first.memory}), decay=0.75)
    assert second.memory["rae/x"] == 0.75 * 0.25 + 0.25 and first.memory["rae/x"] == 0.25


def test_remax_subtracts_what_the_greedy_rollout_got() -> None:
    got = remax(outcomes([1, 0], masks=[np.array([1, 0, 1])] * 2, greedy_rewards=np.array([0.25, 0.25])))
    np.testing.assert_allclose(np.stack(got), [[0.75, 0, 0.75], [-0.25, 0, -0.25]])


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("remax", "greedy_baseline=True"),
        ("gae", "CriticConfig.enabled=True"),
        ("hierarchical", "several agents"),
        ("optimal_token_baseline", "square_sums=True"),
        *((name, "reference_ratios=True") for name in ("online_dpo", "xpo", "nash_md", "optimal_value")),
        ("pf_ppo", "CriticConfig.enabled=True"),
        ("self_distillation", "AlgorithmConfig.hint to 'demonstration'"),
        ("turn_level", "name a component"),
        ("step_and_episode", "name a component"),
    ],
)
def test_what_was_not_recorded_is_refused_with_the_remedy(name: str, missing: str) -> None:
    with pytest.raises(ConfigError, match=missing):
        ADVANTAGES[name](outcomes([1, 0]))


GROUPS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0, -1.0])), max_size=10)


@pytest.mark.parametrize("name", ADVANTAGES)
@settings(deadline=None, max_examples=25)
@given(rows=GROUPS, seed=st.integers(0, 99))
def test_the_order_of_trajectories_changes_nothing_and_nothing_is_nan(name: str, rows: list, seed: int) -> None:
    rewards, groups = np.array([reward for _, reward in rows]), np.array([group for group, _ in rows], int)
    given_outcomes = complete(rewards, groups, seed)
    values = by_token(name, given_outcomes)
    assert len(values) == len(rows)
    assert all(len(value) == len(mask) for value, mask in zip(values, given_outcomes.masks, strict=True))
    assert np.isfinite(np.concatenate([np.zeros(0), *values])).all()
    order = np.random.default_rng(seed).permutation(len(rows))
    if name == "pass_at_k" and len(set(rewards)) < len(rewards):
        return  # of several equally good ones the first counts as the best, but then it gets 0 anyway, or is not best
    for new, old in zip(by_token(name, reordered(given_outcomes, order)), order, strict=True):
        np.testing.assert_allclose(new, values[old], rtol=1e-5, atol=1e-6)


WITHIN_GROUPS = (
    *("grpo", "dr_grpo", "rloo", "opo", "pass_at_k", "max_rl", "remax", "gigpo", "step_and_episode", "turn_level"),
    *("tree_depth", "tree_sibling", "optimal_token_baseline", "online_dpo", "xpo", "nash_md", "optimal_value"),
)


@pytest.mark.parametrize("name", WITHIN_GROUPS)
def test_other_groups_change_nothing(name: str) -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(3), [3, 4, 1])[rng.permutation(8)]
    together = complete(rng.choice([0.0, 0.5, 1.0], 8), groups, 1)
    values = by_token(name, together)
    for group in range(3):
        rows = np.flatnonzero(groups == group)
        for new, row in zip(by_token(name, reordered(together, rows)), rows, strict=True):
            np.testing.assert_allclose(new, values[row], rtol=1e-5, atol=1e-6)


NOT_OF_EQUALS = {
    "remax": "compares with the greedy trajectory",
    "rae": "compares with steps before",
    "gae": "compares with a critic",
    "pf_ppo": "compares with a critic",
    "xpo": "pushes down what the reference would write",
    "nash_md": "pays for the KL to the reference",
    "self_distillation": "compares with itself, which was told more",
}
"""Those that compare with something else than siblings, and so credit what earned the same as they."""


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name not in NOT_OF_EQUALS])
@settings(deadline=None, max_examples=25)
@given(
    reward=st.sampled_from([0.1, 1.0, -3.3, 0.0]),
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_equal_rewards_have_no_advantage(name: str, reward: float, sizes: list[int], seed: int) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    made = complete(np.full(len(groups), reward), groups, seed, turns_of_each=2)
    equal = dataclasses.replace(
        made,
        components={"a": made.rewards},
        turn_rewards=[np.zeros(2)] * len(groups),
        roles=np.full(len(groups), "solver"),
        episodes=groups,
    )
    values = by_token(name, equal)
    np.testing.assert_allclose(np.concatenate(values), 0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shift_invariant", "degree"),
    [
        ("grpo", True, 0), ("dr_grpo", True, 1), ("rloo", True, 1), ("opo", True, 1), ("pass_at_k", True, 0),
        ("max_rl", False, 0), ("gpg", False, 1), ("reinforce_plus_plus", True, 0),
        ("reinforce_plus_plus_baseline", True, 0), ("tree_sibling", True, 1), ("tree_depth", True, 0),
    ],
)  # fmt: skip
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), scale=st.floats(0.5, 4), shift=st.floats(-2, 2))
def test_scaling_and_shifting_rewards(
    name: str, shift_invariant: bool, degree: int, seed: int, scale: float, shift: float
) -> None:
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(3), [2, 3, 4])
    before = complete(rng.random(9) + 0.1, groups, seed)
    after = Outcomes(**vars(before) | {"rewards": scale * before.rewards + (shift if shift_invariant else 0.0)})
    for new, old in zip(by_token(name, after), by_token(name, before), strict=True):
        np.testing.assert_allclose(new, scale**degree * old, rtol=2e-3, atol=2e-3)


def test_one_trajectory_keeps_its_reward() -> None:
    for name in ("grpo", "dr_grpo", "rloo"):
        np.testing.assert_allclose(ADVANTAGES[name](outcomes([2.0])), [2.0], rtol=2e-6)
        assert np.asarray(ADVANTAGES[name](outcomes([1.0, 0.0]))).dtype == np.float32
    noise = {"logprobs": [np.array([-1.0])], "square_sums": [np.array([0.5])]}
    np.testing.assert_allclose(ADVANTAGES["optimal_token_baseline"](outcomes([2.0], **noise)), [[2.0]])
