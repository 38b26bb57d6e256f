"""Every recorded case of verl's losses, aggregations and entropies, values and gradients, against ours."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxrl.config import ModelConfig
from jaxrl.model import logprob
from jaxrl.rl import divergence
from jaxrl.rl.aggregation import aggregation_weights
from jaxrl.rl.policy_losses import POLICY_LOSSES
from jaxrl.rl.targets import Sequences, of_gvpo
from tests.rl.rows import VERL_MODES, close, padded, tokens_of, weights_of

Golden = Callable[[str], list[dict[str, Any]]]


def verl_loss(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Our name and settings for a loss of verl's."""
    low, high = options.get("clip_ratio_low", 0.2), options.get("clip_ratio_high", 0.2)
    clip, drop = {"clip_low": low, "clip_high": high}, {"drop_low": low, "drop_high": high}
    return {
        "vanilla": ("ppo_clip", clip | {"dual_clip": options.get("clip_ratio_c", 3.0)}),
        "dppo_tv": ("dppo_tv", drop | {"cap": options.get("clip_ratio_c")}),
        "dppo_kl": ("dppo_kl", drop | {"cap": options.get("clip_ratio_c")}),
        "gspo": ("gspo_token", clip),
        "sapo": (
            "sapo",
            {"temperature_positive": options.get("tau_pos"), "temperature_negative": options.get("tau_neg")},
        ),
        "gpg": ("reinforce", {}),
        "reinforce": ("reinforce", {}),
        "clip_cov": (
            "clip_cov",
            {
                "share": options.get("clip_cov_ratio"),
                "lowest": options.get("clip_cov_lb"),
                "highest": options.get("clip_cov_ub"),
                "choice": "first",
            },
        ),
        "kl_cov": ("kl_cov", {"share": options.get("kl_cov_ratio"), "penalty": options.get("ppo_kl_coef")}),
        "geo_mean": ("gmpo", clip),
        "dro": ("dro", {"beta": options.get("dro_beta")}),
        "cispo": ("cispo", clip),
    }[name]


def verl_weights(name: str, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Weights under each mode of verl, with what two of its losses do whatever the mode."""
    weights = {mode: weights_of(mask, ours, mask.shape[1]) for mode, ours in VERL_MODES.items()}
    if name == "sapo":
        return dict.fromkeys(weights, weights["seq-mean-token-mean"])
    if name == "geo_mean":  # rows without a token count there
        every_row = weights["seq-mean-token-mean"] * (np.count_nonzero(mask.sum(axis=1)) / len(mask))
        return dict.fromkeys(weights, every_row)
    return weights


@functools.cache
def gradient_of(name: str, settings: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """Value, per-token loss and gradient of a weighted loss, compiled once for each shape."""

    def total(logprobs: Any, weights: Any, mask: Any, advantages: Any, old: Any) -> Any:
        result = POLICY_LOSSES[name](tokens_of(mask, logprobs, advantages, proximal=old), **dict(settings))
        return (weights * result.loss).sum(), result

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def verl_correction(case: dict[str, Any], mask: np.ndarray) -> np.ndarray:
    """[B, T] weights of the sampler's mismatch; the loss of a whole sequence takes their geometric mean."""
    weights = case["inputs"].get("rollout_is_weights", np.ones_like(mask))
    if case["loss"] != "geo_mean":
        return weights
    logarithms = np.where(mask > 0, np.log(np.where(mask > 0, weights, 1)), 0)
    return np.exp(logarithms.sum(axis=1, keepdims=True) / np.maximum(mask.sum(axis=1, keepdims=True), 1)) * mask


def test_policy_losses_match_verl(golden: Golden) -> None:
    cases = golden("verl/policy_losses")
    assert len(cases) == 108
    for case in cases:
        inputs, outputs = case["inputs"], case["outputs"]
        name, settings = verl_loss(case["loss"], case["settings"])
        mask = inputs["response_mask"]
        correction = verl_correction(case, mask)
        old = inputs["rollout_log_prob" if case["loss"] == "reinforce" else "old_log_prob"]
        compute = gradient_of(name, tuple(settings.items()))
        weights = verl_weights(case["loss"], mask)
        assert weights.keys() == outputs["loss"].keys()
        rows = tuple(slice(size) for size in mask.shape)
        rest = [padded(array, (8, 14)) for array in (mask, inputs["advantages"], old)]
        for mode, weight in weights.items():
            (value, result), gradient = compute(
                padded(inputs["log_prob"], (8, 14)), padded(weight * correction, (8, 14)), *rest
            )
            close(value, outputs["loss"][mode], f"{case['id']} {mode}")
            close(gradient[rows], outputs["grad"][mode], f"{case['id']} {mode}", gradient=True)
            assert (np.asarray(gradient)[rest[0] == 0] == 0).all()
        if "loss_mat" in outputs:
            close(result.loss[rows] * correction * mask, outputs["loss_mat"] * mask, case["id"])
        check_verl_metrics(case, {name: values[rows] for name, values in result.metrics.items()}, mask)


def check_verl_metrics(case: dict[str, Any], metrics: dict[str, Any], mask: np.ndarray) -> None:
    shown = {name: (np.asarray(values) * mask).sum() / mask.sum() for name, values in metrics.items()}
    reported = case["outputs"]["metrics"]
    if case["loss"] == "vanilla":
        close(shown["clip_fraction"], reported["actor/pg_clipfrac"], case["id"])
        close(shown["dual_clip_fraction"], reported["actor/pg_clipfrac_lower"], case["id"])
    if case["loss"] in ("gspo", "cispo"):
        close(shown["clip_fraction"], reported["actor/pg_clipfrac"], case["id"])
    if case["loss"] in ("dppo_tv", "dppo_kl"):
        close(shown["drop_fraction"], reported["actor/pg_clipfrac"], case["id"])
    if case["loss"] == "clip_cov":
        drawn = np.asarray(metrics["covariance_clip_fraction"]) * mask
        np.testing.assert_array_equal((1 - drawn) * mask, case["outputs"]["keep_mask"] * mask, err_msg=case["id"])


def test_aggregation_matches_verl_with_global_denominators(golden: Golden) -> None:
    cases = golden("verl/agg_loss")
    assert len(cases) == 60
    for case in cases:
        options, outputs = case["settings"], case["outputs"]
        mode = VERL_MODES[options["loss_agg_mode"]]
        matrix, mask = case["inputs"]["loss_mat"], case["inputs"]["loss_mask"]
        length = options.get("loss_scale_factor", mask.shape[1])
        # Trajectories on other devices: they make up the difference between local and global counts.
        sequences = options.get("global_batch_size", 0) - np.count_nonzero(mask.sum(axis=1))
        tokens = int(options.get("batch_num_tokens", 0) - mask.sum())
        elsewhere = (
            [np.ones(part.size) for part in np.array_split(np.arange(tokens), sequences)] if sequences > 0 else []
        )
        weights = np.stack(aggregation_weights([*mask, *elsewhere], mode, length)[: len(mask)])
        weights = weights * options.get("dp_size", 1)
        close((weights * matrix).sum(), outputs["loss"], case["id"])
        close(weights, outputs["grad"], case["id"], gradient=True)


def test_kl_matches_verl(golden: Golden) -> None:
    ours = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
    cases = golden("verl/kl_penalty")
    assert len(cases) == 39
    for case in cases:
        name = case["settings"]["kl_penalty"]
        estimator = ours.get(name.removesuffix("+"), name.removesuffix("+"))
        if name.endswith("+") and estimator != "k2":  # whose gradient is already its own
            estimator += "+"
        logprobs, reference = case["inputs"]["log_prob"], case["inputs"]["ref_log_prob"]

        def total(logprobs: Any, reference: Any = reference, estimator: Any = estimator) -> Any:
            values = divergence.kl(logprobs, reference, np.ones_like(reference), estimator)
            return values.sum(), values

        gradient, values = jax.grad(total, has_aux=True)(logprobs)
        close(values, case["outputs"]["kl"], case["id"])
        close(gradient, case["outputs"]["grad"], case["id"], gradient=True)


# What is left out of verl/recipe_losses, and why.
NO_LOSS_HERE = {
    "prime_rloo": "token rewards of a model trained beside the policy; without them in test_advantages_golden.py",
    "prime_ce": "trains that model, an implicit one, on answers of the present policy; ours are trained before",
}


def test_recipe_losses_match_verl(golden: Golden) -> None:
    cases = golden("verl/recipe_losses")
    left_out = [case for case in cases if case["id"].partition("/")[0] in NO_LOSS_HERE]
    assert (len(cases), len(left_out)) == (30, 12)
    for case in cases:
        if case in left_out:
            continue
        inputs = {name: np.asarray(values, np.float32) for name, values in case["inputs"].items()}
        mask = inputs["loss_mask"]
        name, settings, target, weights = recipe_loss(case, inputs)
        arrays = inputs["logprobs"], weights, mask, target[:, None] * mask, inputs["proximal_logprobs"]
        (value, _), gradient = gradient_of(name, tuple(settings.items()))(*arrays)
        close(value, case["outputs"]["loss"], case["id"])
        close(gradient, case["outputs"]["grad"], case["id"], gradient=True)
        if name == "flowrl":  # ln Z stands beside the mean of the log-probabilities
            close(gradient.sum(axis=1), np.ravel(case["outputs"]["grad_log_z"]), case["id"], gradient=True)


def recipe_loss(
    case: dict[str, Any], inputs: dict[str, np.ndarray]
) -> tuple[str, dict[str, float], np.ndarray, np.ndarray]:
    """Our name and settings, the target of every sequence [N], and weights of tokens."""
    name, mask, settings = case["id"].partition("/")[0], inputs["loss_mask"], case["settings"]
    if name == "sppo":
        return name, {"eta": settings["eta"]}, inputs["rewards"], weights_of(mask, "sequence")
    lengths = mask.sum(axis=1)
    means = {key: (inputs[key] * mask).sum(axis=1) / np.maximum(lengths, 1) for key in ("logprobs", "old_logprobs")}
    advantages = (inputs["advantages"] * mask).sum(axis=1) / np.maximum(lengths, 1)
    every_row = mask / np.maximum(lengths, 1)[:, None]
    if name == "flowrl":
        target = settings["beta_coef"] * advantages + means["old_logprobs"] - inputs["log_z"].reshape(-1)
        return name, {"beta": settings["beta_coef"]}, target, every_row / len(mask)
    drift = ((inputs["logprobs"] - inputs["proximal_logprobs"]) * mask).sum(axis=1)
    sequences = Sequences(inputs["uid"].astype(int), advantages, drift, means["logprobs"], np.zeros(len(mask)), lengths)
    return name, {"beta": settings["beta"]}, of_gvpo(sequences, beta=settings["beta"]), every_row / (settings["n"] - 1)


def test_entropies_match_verl(golden: Golden) -> None:
    """The model's own scoring, with logits for hidden states and the identity for its head."""
    recorded = golden("verl/value_entropy")
    cases = [case for case in recorded if case["id"].startswith(("entropy/", "token_stats/"))]
    # The others are the adaptive weight below, value losses (30) and whitening (3), which are no business of a loss.
    assert (len(recorded), len(cases)) == (54, 18)

    def total(logits: Any, labels: Any, weights: Any) -> Any:
        head = {"embedding": np.eye(logits.shape[-1], dtype=np.float32)}
        stats = logprob.token_logprobs(head, ModelConfig(logprob_chunk=8), logits, labels)
        return (weights * stats.entropy).sum(), stats

    compute = jax.jit(jax.value_and_grad(total, has_aux=True))
    for case in cases:
        inputs, outputs = case["inputs"], case["outputs"]
        logits, mask = np.asarray(inputs["logits"], np.float32), np.asarray(inputs["mask"], np.float32)
        mode = VERL_MODES[case.get("settings", {}).get("loss_agg_mode", "token-mean")]
        weights = weights_of(mask, mode, mask.shape[1])
        (value, stats), gradient = compute(logits, np.asarray(inputs["labels"], np.int32), weights)
        if "entropy" in outputs:
            close(stats.entropy, outputs["entropy"], case["id"])
            close(stats.logprobs, outputs["logprobs"], case["id"])
        else:
            close(value, outputs["loss"], case["id"])
            close(gradient, outputs["grad"], case["id"], gradient=True)


def test_adaptive_kl_weight_matches_verl(golden: Golden) -> None:
    cases = [case for case in golden("verl/value_entropy") if case["id"].startswith("kl_controller/")]
    assert len(cases) == 3
    for case in cases:
        options = case["settings"]
        coefficient, found = options["init_kl_coef"], []
        for value in case["inputs"]["kl"]:
            coefficient = divergence.adapted(
                coefficient,
                value,
                target=options["target_kl"],
                horizon=options["horizon"],
                count=options["n_steps"],
            )
            found.append(coefficient)
        np.testing.assert_allclose(found, case["outputs"]["coef"], rtol=1e-12)
