"""Every recorded case of corrections for the sampler's mismatch and for stale tokens: verl, AReaL, slime."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.rl.mismatch import gap
from jaxrl.rl.mismatch.rejection import band, divergence, off_policy_negatives
from jaxrl.rl.mismatch.weights import icepop, tis
from jaxrl.rl.policy_losses import POLICY_LOSSES
from jaxrl.rl.tokens import Tokens
from tests.rl.rows import close, tokens_of, weights_of

Golden = Callable[[str], list[dict[str, Any]]]
Settings = tuple[tuple[str, Any], ...]

UNBOUNDED = 1e9
VERL_SPANS = {"token": "token", "sequence": "product"}
VERL_MODES = {"token-mean": "token", "seq-mean-token-sum": "sequence_sum", "seq-mean-token-mean": "sequence"}


def judged(mask: Any, proximal: Any, behaviour: Any) -> Tokens:
    """Tokens of which only the two older policies matter."""
    return tokens_of(mask, proximal, np.zeros_like(mask), proximal=proximal, behaviour=behaviour)


def as_arrays(case: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(values, np.float32) for name, values in case["inputs"].items()}


def verl_weights(tokens: Tokens, options: dict[str, Any]) -> jax.Array:
    """A single threshold truncates, two are a band outside of which the weight is 0."""
    settings = {
        "span": VERL_SPANS[options["rollout_is"]],
        "normalize": options.get("rollout_is_batch_normalize", False),
    }
    bounds = [float(bound) for bound in str(options["rollout_is_threshold"]).split("_")]
    if len(bounds) == 1:
        return tis(tokens, cap=bounds[0], **settings)
    return icepop(tokens, low=bounds[0], high=bounds[1], **settings)


def verl_keep(tokens: Tokens, options: dict[str, Any]) -> jax.Array:
    """All of the named rules must pass; bounds of k1 are those of 1 / k."""
    names = options["rollout_rs"].split(",")
    thresholds = str(options["rollout_rs_threshold"]).split(",")
    keep = tokens.mask
    for name, threshold in zip(names, thresholds * (len(names) if len(thresholds) == 1 else 1), strict=True):
        where, _, estimator = name.rpartition("_")
        if estimator == "k1":
            span = {"token": "token", "seq_sum": "product", "seq_mean": "geometric"}[where]
            bounds = [float(bound) for bound in threshold.split("_")]
            low, high = bounds if len(bounds) == 2 else (1 / bounds[0], bounds[0])
            keep = keep * band(tokens, span=span, low=1 / high, high=1 / low)
        else:
            over = {"token": "token", "seq_sum": "sum", "seq_mean": "mean", "seq_max": "largest"}[where]
            keep = keep * divergence(tokens, estimator=estimator, over=over, most=float(threshold))
    return keep


def test_weights_and_rejections_match_verl(golden: Golden) -> None:
    cases = [case for case in golden("verl/rollout_correction") if case["id"].startswith(("is/", "rs/"))]
    assert len(cases) == 62
    for case in cases:
        inputs, outputs = as_arrays(case), case["outputs"]
        tokens = judged(inputs["response_mask"], inputs["old_log_prob"], inputs["rollout_log_prob"])
        if case["id"].startswith("rs/"):
            np.testing.assert_array_equal(verl_keep(tokens, case["settings"]), outputs["mask"], err_msg=case["id"])
        else:  # verl fails where it zeroed every weight
            expected = outputs.get("weights", np.zeros_like(inputs["response_mask"]))
            close(verl_weights(tokens, case["settings"]), expected, case["id"])


def test_the_logged_gap_matches_verl(golden: Golden) -> None:
    """Of its metrics ours are two; perplexities and chi-squared are not reported."""
    cases = [case for case in golden("verl/rollout_correction") if case["id"].startswith("offpolicy/")]
    assert len(cases) == 2
    for case in cases:
        inputs = as_arrays(case)
        pairs = gap(inputs["old_log_prob"], inputs["rollout_log_prob"], inputs["response_mask"])
        total, count = pairs["sampler_kl"]
        close(total / count, case["outputs"]["metrics"]["k3_kl"], case["id"])


@functools.cache
def corrected_gradient(name: str, settings: Settings) -> Callable[..., Any]:
    """Value and gradient of a loss of the tokens that are kept, weighted."""

    def total(logprobs: Any, weights: Any, mask: Any, advantages: Any, proximal: Any) -> jax.Array:
        tokens = tokens_of(mask, logprobs, advantages, proximal=proximal)
        return (weights * POLICY_LOSSES[name](tokens, **dict(settings)).loss).sum()

    return jax.jit(jax.value_and_grad(total))


def test_bypassing_the_proximal_policy_matches_verl(golden: Golden) -> None:
    """There what is rejected leaves the denominators, so the weights are made from the mask that is left."""
    cases = [case for case in golden("verl/rollout_correction") if case["id"].startswith("bypass/")]
    assert len(cases) == 24
    for case in cases:
        inputs, options, outputs = as_arrays(case), case["settings"], case["outputs"]
        mask, sampler = inputs["response_mask"], inputs["rollout_log_prob"]
        tokens = judged(mask, inputs["log_prob"], sampler)
        kept = np.asarray(verl_keep(tokens, options)) if options["rollout_rs"] else mask
        if options["loss_type"] == "ppo_clip":
            settings = {"clip_low": options["clip_ratio_low"], "clip_high": options["clip_ratio_high"]}
            name, correction = "ppo_clip", mask
        else:
            name, settings, correction = "reinforce", {}, np.asarray(verl_weights(tokens, options))
        compute = corrected_gradient(name, tuple(settings.items()))
        for mode, expected in outputs["loss"].items():
            weights = weights_of(kept, VERL_MODES[mode]) * correction
            value, gradient = compute(inputs["log_prob"], weights, kept, inputs["advantages"], sampler)
            if not kept.any():  # there 0 / 0
                assert expected == "NaN" and value == 0 and not np.asarray(gradient).any()
                continue
            close(value, expected, f"{case['id']} {mode}")
            close(gradient, outputs["grad"][mode], f"{case['id']} {mode}", gradient=True)


def areal_correction(tokens: Tokens, rule: dict[str, Any] | None) -> tuple[jax.Array, jax.Array]:
    """Weights, and which tokens are kept."""
    if rule is None:
        return tokens.mask, tokens.mask
    whole, by_ratio = rule["level"] == "sequence", rule["metric"] == "ratio"
    lower, upper = rule["lower"], rule["upper"]
    span = "geometric" if whole and by_ratio else "token"
    if rule["action"] == "clamp":
        # By an estimate of the KL it clamps the ratios of sequences that are out of bounds: here all of them are.
        return tis(tokens, span=span, cap=upper, floor=lower or 0.0), tokens.mask
    weights = tis(tokens, span=span, cap=UNBOUNDED)
    if by_ratio:
        spans = {"sum": "product", "mean": "geometric", "max": "largest"}
        return weights, band(tokens, span=spans[rule["agg"]] if whole else "token", low=lower or 0.0, high=upper)
    if rule["metric"] == "kl_k1":
        return weights, band(tokens, low=np.exp(lower), high=np.exp(upper))
    over = {"sum": "sum", "mean": "mean", "max": "largest"}[rule["agg"]] if whole else "token"
    estimator = {"kl_k2": "k2", "kl_k3": "k3_mirrored"}[rule["metric"]]
    return weights, divergence(tokens, estimator=estimator, over=over, most=upper)


ELSEWHERE = {"critic": "test_value_loss.py", "overlong": "test_components.py", "norm": "test_advantages_golden.py"}
"""Where the cases of AReaL's file are compared that are no loss of the policy."""


def test_decoupled_losses_match_areal(golden: Golden) -> None:
    """Denominators stay those of the mask before the rejection."""
    cases = golden("areal/decoupled_ppo")
    left_out = [case for case in cases if case["id"].partition("/")[0] in ELSEWHERE]
    assert (len(cases), len(left_out)) == (149, 9)
    for case in cases:
        if case in left_out:
            continue
        inputs, options, outputs = as_arrays(case), case["settings"], case["outputs"]
        mask, proximal = inputs["loss_mask"], inputs["proximal_logprobs"]
        span = {"token": "token", "sequence": "geometric"}[options["importance_sampling_level"]]
        tokens = judged(mask, proximal, inputs["old_logprobs"])
        if case["loss"] == "sapo":
            name, correction, kept = "sapo", mask, mask
            settings = {"temperature_positive": options["tau_pos"], "temperature_negative": options["tau_neg"]}
        else:
            name, (correction, kept) = "ppo_clip", areal_correction(tokens, options["rejection_sampling"])
            high = options["eps_clip_higher"] or options["eps_clip"]
            settings = {"clip_low": options["eps_clip"], "clip_high": high, "dual_clip": options["c_clip"] or 0.0}
        if "behave_imp_weight" in outputs:
            close(correction * kept, outputs["behave_imp_weight"], case["id"])
        compute = corrected_gradient(name, tuple((settings | {"span": span}).items()))
        weights = weights_of(mask, "token") * correction
        advantages = inputs["advantages"]
        if span == "geometric":  # one for the sequence there; ours keeps those of tokens
            advantages = jnp.broadcast_to(advantages, mask.shape)
            advantages = tokens.replace(mask=jnp.asarray(kept)).mean_over_sequence(advantages)
        value, gradient = compute(inputs["logprobs"], weights, kept, advantages, proximal)
        close(value, outputs["loss"], case["id"])
        close(gradient, outputs["grad"], case["id"], gradient=True)


def slime_settings(kind: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    clip = {"clip_low": options["eps_clip"], "clip_high": options["eps_clip_high"]}
    if kind == "cispo":
        return "cispo", clip
    dual = {"dual_clip": options.get("eps_clip_c") or 0.0}
    return "ppo_clip", clip | dual | {"span": "geometric" if kind == "gspo" else "token"}


def test_corrections_match_slime(golden: Golden) -> None:
    cases = golden("slime/icepop_tis")
    assert len(cases) == 30
    for case in cases:
        inputs, options, outputs = as_arrays(case), case["settings"], case["outputs"]
        kind, mask = case["id"].partition("/")[0], inputs["loss_mask"]
        proximal = inputs["proximal_logprobs"]
        if kind == "opsm":
            tokens = tokens_of(mask, inputs["logprobs"], inputs["advantages"], behaviour=proximal)
            kept = off_policy_negatives(tokens, most=options["delta"])
            np.testing.assert_array_equal(kept, outputs["keep"] * mask, err_msg=case["id"])
            continue
        tokens, correction = judged(mask, proximal, inputs["old_logprobs"]), jnp.asarray(mask)
        if kind == "icepop_function":
            correction = icepop(tokens, low=options["low"], high=options["high"])
        elif kind == "vanilla_tis_function":
            correction = tis(tokens, floor=options["low"], cap=options["high"])
        name, settings = slime_settings(kind, options)
        compute = corrected_gradient(name, tuple(settings.items()))
        expected = np.where(mask > 0, outputs["pg_loss"], 0)
        value, gradient = compute(inputs["logprobs"], correction, mask, inputs["advantages"], proximal)
        if "weight" in outputs:
            close(correction, outputs["weight"] * mask, case["id"])
        close(value, expected.sum(), case["id"])
        close(gradient, outputs["grad_masked_sum"], case["id"], gradient=True)
