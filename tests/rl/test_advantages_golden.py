"""Advantages against verl and TRL: every recorded case is compared, or stands here with the reason why not."""

import ast
import collections
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxrl.rl.advantages import ADVANTAGES
from jaxrl.rl.advantages.gae import advantages_and_returns
from jaxrl.rl.advantages.returns import whitened
from jaxrl.rl.outcomes import Outcomes

Case = dict[str, Any]
Golden = Callable[[str], list[Case]]

VERL_NAMES: dict[str, tuple[str, Callable[[Case], dict[str, Any]]]] = {
    "grpo": ("grpo", lambda s: {"scale": "group" if s["norm_adv_by_std_in_grpo"] else "none"}),
    "grpo_vectorized": ("grpo", lambda s: {"scale": "group" if s["norm_adv_by_std_in_grpo"] else "none"}),
    "grpo_passk": ("pass_at_k", lambda s: {"scale": s["norm_adv_by_std_in_grpo"]}),
    "rloo": ("rloo", lambda s: {}),
    "rloo_vectorized": ("rloo", lambda s: {"alone": "zero"}),
    "opo": ("opo", lambda s: {}),
    "gpg": ("gpg", lambda s: {"norm": s["f_norm"]}),
    "reinforce_plus_plus": ("reinforce_plus_plus", lambda s: {"discount": s["gamma"]}),
    "reinforce_plus_plus_baseline": ("reinforce_plus_plus_baseline", lambda s: {}),
    "gdpo": ("gdpo", lambda s: {}),
    "remax": ("remax", lambda s: {}),
    "gae": ("gae", lambda s: {"discount": s["gamma"], "decay": s["lam"]}),
    "optimal_token_baseline": (
        "optimal_token_baseline",
        lambda s: {"align": "position", "zero_tail": s["handle_zero_tail"]},
    ),
    "tir_optimal_token_baseline": ("optimal_token_baseline", lambda s: {"zero_tail": s["handle_zero_tail"]}),
}
"""Our name and settings for each of verl's."""

VERL_LEFT_OUT = {
    "grpo_passk/a3/norm_adv_by_std_in_grpo=True": "verl raises on a trajectory alone in its group; here it gets 0",
    "grpo_passk/a3/norm_adv_by_std_in_grpo=False": "verl raises on a trajectory alone in its group; here it gets 0",
}
TRL_ELSEWHERE = {"vllm_is": 12, "soft_overlong_punishment": 4}
"""Cases of that file that are no advantages: weights (test_golden_remaining.py) and a reward (test_components.py)."""


def verl_outcomes(case: Case) -> Outcomes:
    inputs, settings = case["inputs"], case["settings"]
    masks = inputs["response_mask"]
    rewards = np.asarray(inputs.get("token_level_rewards", np.zeros_like(masks)), np.float64)
    components = {name: inputs[name] for name in ("component_a", "component_b") if name in inputs}
    weights = ast.literal_eval(settings.get("weights", "None")) or [1.0, 1.0]
    return Outcomes(
        rewards=rewards.sum(axis=1),
        groups=np.asarray(inputs.get("index", np.arange(len(masks)))),
        masks=list(masks),
        token_rewards=list(rewards),
        components=components,
        component_weights=dict(zip(components, weights, strict=False)),
        logprobs=inputs.get("old_log_probs"),
        square_sums=inputs.get("sum_pi_squared"),
        ratios=list(inputs["rollout_is_weights"]) if settings.get("use_is") else None,
        values=inputs.get("values"),
        greedy_rewards=inputs.get("reward_baselines"),
    )


def test_verl(golden: Golden) -> None:
    counted: collections.Counter[str] = collections.Counter()
    for case in golden("verl/advantages"):
        counted[case["estimator"]] += 1
        outcomes = verl_outcomes(case)
        name, settings = VERL_NAMES[case["estimator"]]
        values = ADVANTAGES[name](outcomes, **settings(case["settings"]))
        if case["id"] in VERL_LEFT_OUT:
            assert case["outputs"] == {"raises": "ValueError"} and not np.any(values[outcomes.groups == "g0"])
            continue
        got = np.stack([value * mask for value, mask in zip(values, outcomes.masks, strict=True)])
        expected = case["outputs"]["advantages"] * case["inputs"]["response_mask"]  # verl's gae also fills the padding
        constant = case["estimator"].startswith("reinforce_plus_plus") and case["bundle"] in ("a5", "a7")
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 if constant else 1e-6, err_msg=case["id"])
    assert sum(counted.values()) == 232 and set(counted) == set(VERL_NAMES)


def test_returns_of_gae_are_not_whitened(golden: Golden) -> None:
    cases = [case for case in golden("verl/advantages") if case["estimator"] == "gae"]
    for case in cases:
        outcomes = verl_outcomes(case)
        _, returns = advantages_and_returns(
            outcomes.rewards_by_token(),
            outcomes.values,
            outcomes.masks,
            discount=case["settings"]["gamma"],
            decay=case["settings"]["lam"],
        )
        mask = case["inputs"]["response_mask"]
        np.testing.assert_allclose(np.stack(returns), case["outputs"]["returns"] * mask, rtol=1e-5, atol=1e-6)
    assert len(cases) == 32


def test_whitening(golden: Golden) -> None:
    cases = [case for case in golden("verl/value_entropy") if case["id"].startswith("whiten/")]
    for case in cases:
        values, masks = list(case["inputs"]["values"]), list(case["inputs"]["mask"])
        chosen = np.stack(masks) > 0
        for key, shift in (("whitened", True), ("whitened_keep_mean", False)):
            got = np.stack(whitened(values, masks, shift=shift))
            np.testing.assert_allclose(got[chosen], case["outputs"][key][chosen], rtol=1e-5, atol=1e-6)
            assert not got[~chosen].any()
    assert len(cases) == 3


def test_normalisation_of_areal_is_whitening_with_the_variance_over_n(golden: Golden) -> None:
    """Its std is of n tokens where ours is of n - 1, with 1e-5 beside it."""
    cases = [case for case in golden("areal/decoupled_ppo") if case["id"].startswith("norm/")]
    for case in cases:
        values, masks = list(case["inputs"]["x"]), list(case["inputs"]["mask"])
        chosen = np.stack(masks) > 0
        assert case["settings"] == {"unbiased": False, "eps": 1e-5}
        got = np.stack(whitened(values, masks))[chosen] * np.sqrt(chosen.sum() / (chosen.sum() - 1))
        np.testing.assert_allclose(got, case["outputs"]["normalised"][chosen], rtol=1e-4, atol=1e-6, err_msg=case["id"])
    assert len(cases) == 2


def test_prime_without_its_reward_model_is_rloo_whitened_over_tokens(golden: Golden) -> None:
    """The cases whose weight of the outcome is 1; the others are left out in test_golden_verl.py."""
    cases = [case for case in golden("verl/recipe_losses") if case["id"].startswith("prime_rloo/")]
    cases = [case for case in cases if case["settings"]["reward_dpo_coef"] == 0]
    for case in cases:
        masks, rewards = np.asarray(case["inputs"]["loss_mask"]), np.asarray(case["inputs"]["acc"], np.float64)
        groups = np.arange(len(rewards)) // case["settings"]["n_samples"]
        values = ADVANTAGES["rloo"](Outcomes(rewards=rewards, groups=groups, masks=list(masks)))
        got = np.stack(whitened([value * mask for value, mask in zip(values, masks, strict=True)], list(masks)))
        expected = case["outputs"]["advantages"] * masks
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, err_msg=case["id"])
    assert len(cases) == 3


def trl_advantages(case: Case) -> np.ndarray:
    """Trajectories that no function scored leave first, as those do here that cannot train."""
    settings, inputs = case["settings"], case["inputs"]
    by_function, weights = np.array(inputs["rewards_per_func"], np.float64), np.array(inputs["reward_weights"])
    scored = ~np.isnan(by_function).all(axis=1)
    groups = np.arange(len(by_function)) // settings["num_generations"]
    outcomes = Outcomes(
        rewards=np.nansum(by_function * weights, axis=1)[scored],
        groups=groups[scored],
        masks=[np.ones(1)] * scored.sum(),
        components={str(index): column[scored] for index, column in enumerate(by_function.T)},
        component_weights={str(index): weight for index, weight in enumerate(weights)},
    )
    values = np.zeros(len(by_function))
    if case["estimator"] == "rloo":
        low, high = settings["reward_clip_range"] or (-np.inf, np.inf)
        values[scored] = ADVANTAGES["rloo"](
            outcomes, normalize=settings["normalize_advantages"], reward_low=low, reward_high=high
        )
    elif settings["multi_objective_aggregation"] == "normalize_then_sum":
        values[scored] = ADVANTAGES["gdpo"](outcomes, epsilon=1e-4, over="trajectories")
    else:
        values[scored] = ADVANTAGES["grpo"](outcomes, epsilon=1e-4, scale=settings["scale_rewards"])
    return values


def test_trl(golden: Golden) -> None:
    counted: collections.Counter[str] = collections.Counter()
    for case in golden("trl/advantages"):
        counted[case["estimator"]] += 1
        if case["estimator"] not in TRL_ELSEWHERE:
            expected = np.array(case["outputs"]["advantages"], np.float64)
            np.testing.assert_allclose(trl_advantages(case), expected, rtol=1e-5, atol=1e-6, err_msg=case["id"])
    assert counted == {"grpo": 32, "rloo": 24, **TRL_ELSEWHERE}


@pytest.mark.parametrize("std", ["False", "True"])
def test_dars_centres_groups_of_unequal_sizes(golden: Golden, std: str) -> None:
    cases = [case for case in golden("dars/allocation") if case["id"].startswith("adv/") and case["id"].endswith(std)]
    for case in cases:
        inputs = case["inputs"]
        outcomes = Outcomes(
            rewards=inputs["token_level_rewards"].astype(np.float64).sum(axis=1),
            groups=np.asarray(inputs["index"]),
            masks=list(inputs["response_mask"]),
        )
        values = ADVANTAGES["grpo"](outcomes, scale="group" if std == "True" else "none", alone="zero")
        got = np.asarray(values)[:, None] * inputs["response_mask"]
        np.testing.assert_allclose(got, case["outputs"]["advantages"], rtol=1e-5, atol=1e-6, err_msg=case["id"])
    assert len(cases) == 3
