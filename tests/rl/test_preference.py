"""Preference losses and their gradients against TRL, every case; sums of long answers; empty places."""

import collections
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import ConfigError
from jaxrl.rl.preference import JUDGED_LOSSES, PAIR_LOSSES
from jaxrl.rl.preference.margins import exo_pair, robust
from jaxrl.rl.preference.records import Answers, Judged, Pairs, agreement, pairwise_sum, segment_sums, without_length

Golden = Callable[[str], list[dict[str, Any]]]
RENAMED = {"f_divergence_type": "divergence", "discopop_tau": "tau"}
OF_THE_BATCH = {"loss_types", "loss_weights", "use_weighting", "ld_alpha"}
SMOOTHED = {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"}


def close(got: Any, wanted: Any, name: str, *, gradient: bool = False) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-4 if gradient else 1e-5, atol=1e-6, err_msg=name)


def answers(logprobs: jax.Array, reference: Any, lengths: Any) -> Answers:
    return Answers(logprobs, logprobs - reference, jnp.asarray(lengths, jnp.float32))


def rows_of(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mask and segments of TRL's rows [2N, T], laid out as ours: a row holds both answers of a pair."""
    mask = np.asarray(case["inputs"]["completion_mask"])[:, 1:].astype(np.float32)
    count, width = len(mask) // 2, mask.shape[1]
    side_by_side = np.concatenate([mask[:count], mask[count:]], axis=1)
    return side_by_side, np.broadcast_to(np.repeat([1, 2], width), side_by_side.shape).astype(np.int32)


def dpo_loss(per_token: jax.Array, case: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """As the trainer does it: sums over segments, weights of tokens and of pairs, a mean over pairs."""
    inputs, settings = case["inputs"], case["settings"]
    mask, segments = rows_of(case)
    count = len(mask)
    logprobs = jnp.concatenate([per_token[:count], per_token[count:]], axis=1)
    weights = without_length(jnp.asarray(mask), jnp.asarray(segments), 2, settings.get("ld_alpha", 1.0))
    sums = segment_sums(logprobs * weights, jnp.asarray(segments), 2)
    lengths = mask.reshape(count, 2, -1).sum(axis=2)
    pairs = Pairs(
        answers(sums[:, 0], inputs["ref_chosen_logps"], lengths[:, 0]),
        answers(sums[:, 1], inputs["ref_rejected_logps"], lengths[:, 1]),
        jnp.ones(count),
    )
    options = {RENAMED.get(name, name): value for name, value in settings.items() if name not in OF_THE_BATCH}
    total, last = jnp.zeros(()), jnp.zeros(count)
    for name, weight in zip(settings["loss_types"], settings.get("loss_weights", [1.0]), strict=True):
        if name == "sft":
            nll = -logprobs[:, : mask.shape[1] // 2] * mask[:, : mask.shape[1] // 2]
            last, term = nll.sum() / mask[:, : mask.shape[1] // 2].sum(), nll.sum() / lengths[:, 0].sum()
        else:
            mine = options if name in SMOOTHED else {k: v for k, v in options.items() if k != "label_smoothing"}
            unlike_the_paper = {"shifted": False} if name == "bco_pair" else {}
            last = PAIR_LOSSES[name](pairs, **mine, **unlike_the_paper)
            if settings.get("use_weighting"):
                squares = np.asarray(inputs["log_sum_sq_probs"])
                squares = jnp.concatenate([squares[:count], squares[count:]], axis=1)
                both = agreement(logprobs, squares, jnp.asarray(mask), jnp.asarray(segments), 2)
                last = last * both[:, 0] * both[:, 1]
            term = last.mean()
        total += weight * term
    return total, last


def check_dpo(case: dict[str, Any]) -> None:
    outputs = case["outputs"]
    (loss, per_pair), gradient = jax.value_and_grad(dpo_loss, has_aux=True)(
        jnp.asarray(case["inputs"]["per_token_logps"]), case
    )
    close(loss, outputs["loss"], case["id"])
    close(gradient, outputs["grad"], case["id"], gradient=True)
    wanted = np.asarray(outputs["per_pair"])
    if case["loss"].startswith("aot"):  # theirs is sorted by margin, ours stands at its pair
        per_pair, wanted = np.sort(per_pair), np.sort(wanted)
    if np.shape(wanted) == np.shape(per_pair):
        close(per_pair, wanted, case["id"])


def check_kto(case: dict[str, Any]) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    mask = np.asarray(inputs["completion_mask"])[:, 1:]

    def loss(per_token: jax.Array) -> jax.Array:
        sums = (per_token * mask).sum(axis=1)
        judged = Judged(
            answers(sums, inputs["ref_logps"], mask.sum(axis=1)),
            desirable=jnp.asarray(inputs["label"]).astype(bool),
            unrelated=jnp.asarray(inputs["KL_logps"]) - jnp.asarray(inputs["ref_KL_logps"]),
            present=jnp.ones(len(mask)),
        )
        return JUDGED_LOSSES[case["loss"]](judged, **case["settings"]).mean()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(inputs["per_token_logps"]))
    close(value, outputs["loss"], case["id"])
    close(gradient, outputs["grad"], case["id"], gradient=True)


def check_reference_free(case: dict[str, Any]) -> None:
    """CPO and its kin are given scores of whole answers, so lengths are 1 and there is no reference."""
    inputs, outputs, settings = case["inputs"], case["outputs"], case["settings"]
    chosen, rejected = (jnp.asarray(inputs[f"policy_{side}_logps"], jnp.float32) for side in ("chosen", "rejected"))
    options: dict[str, Any] = {"beta": settings["beta"]}
    name, sign = case["loss"].removeprefix("cpo_"), 1.0
    if name == "simpo" or settings.get("alpha"):
        options |= {"gamma": settings["simpo_gamma"], "alpha": settings["alpha"]}
        name = "simpo"
    if name in ("simpo", "sigmoid"):
        options["label_smoothing"] = settings["label_smoothing"]
    if name == "orpo":
        sign = -1.0  # TRL subtracts it

    def loss(chosen: jax.Array, rejected: jax.Array) -> tuple[jax.Array, jax.Array]:
        ones = np.ones(len(chosen))
        pairs = Pairs(answers(chosen, 0.0, ones), answers(rejected, 0.0, ones), jnp.asarray(ones))
        per_pair = sign * PAIR_LOSSES[name](pairs, **options)
        return per_pair.mean(), per_pair

    gradients, per_pair = jax.grad(loss, argnums=(0, 1), has_aux=True)(chosen, rejected)
    close(per_pair, outputs["losses"], case["id"])
    close(gradients[0], outputs["grad_chosen"], case["id"], gradient=True)
    close(gradients[1], outputs["grad_rejected"], case["id"], gradient=True)


def test_every_case_of_trl(golden: Golden) -> None:
    checks = {"dpo": check_dpo, "kto": check_kto, "cpo": check_reference_free, "orpo": check_reference_free}
    checked = collections.Counter()
    for case in golden("trl/preference_losses"):
        kind = case["id"].split("/")[0]
        checks[kind](case)
        checked[kind] += 1
    assert checked == {"dpo": 143, "kto": 16, "cpo": 16, "orpo": 4}


def some_pairs(count: int, present: int) -> Pairs:
    draw = np.random.default_rng(0)
    sides = [
        answers(
            jnp.asarray(draw.normal(-9, 2, count), jnp.float32), draw.normal(-9, 2, count), draw.integers(3, 9, count)
        )
        for _ in range(2)
    ]
    return Pairs(*sides, present=jnp.asarray(np.arange(count) < present, jnp.float32))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_empty_places_change_no_loss_and_have_no_gradient(name: str) -> None:
    pairs = some_pairs(5, 3)
    alone = jax.tree.map(lambda leaf: leaf[:3], pairs)

    def total(pairs: Pairs) -> jax.Array:
        return jnp.where(pairs.present > 0, PAIR_LOSSES[name](pairs), 0.0).sum()

    close(total(pairs), total(alone), name)
    gradient, wanted = jax.grad(total)(pairs), jax.grad(total)(alone)
    close(gradient.chosen.logprobs[:3], wanted.chosen.logprobs, name)
    close(gradient.chosen.log_ratios[3:], np.zeros(2), name)


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES.keys() - {"discopop"}))  # whose loss rises with the margin around 0
def test_a_step_down_the_gradient_widens_the_margin(name: str) -> None:
    drawn = some_pairs(1, 1)
    nothing = jnp.zeros(1)  # apo_down narrows it where it is wide, so all begin at the reference
    pairs = drawn.replace(
        chosen=drawn.chosen.replace(log_ratios=nothing), rejected=drawn.rejected.replace(log_ratios=nothing)
    )
    gradient = jax.grad(lambda pairs: PAIR_LOSSES[name](pairs).sum())(pairs)
    chosen, rejected = (side.logprobs + side.log_ratios for side in (gradient.chosen, gradient.rejected))
    assert float((chosen - rejected)[0]) < 0


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_extreme_log_ratios_and_no_pairs_at_all_give_no_nan(name: str) -> None:
    far = jnp.array([-1e3, 1e3, 0.0, -1e3])
    zero = jnp.zeros(4)
    sides = [Answers(jnp.minimum(ratios, 0.0), ratios, jnp.array([1.0, 9, 1, 1])) for ratios in (far, far[::-1])]
    divergences = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    names = divergences if "divergence" in inspect.signature(PAIR_LOSSES[name]).parameters else ("",)
    for divergence, present in itertools.product(names, (zero, zero + 1)):
        options = {"divergence": divergence} if divergence else {}

        def total(pairs: Pairs, options: dict[str, Any] = options) -> jax.Array:
            return PAIR_LOSSES[name](pairs, **options).sum()

        value, gradient = jax.value_and_grad(total)(Pairs(*sides, present=present))
        assert np.isfinite([value, *np.ravel(jax.tree.leaves(gradient))]).all(), divergence


def test_judged_answers_move_up_or_down_and_empty_places_count_for_nothing() -> None:
    side = some_pairs(4, 4).chosen
    judged = Judged(
        side, jnp.array([True, False, True, True]), jnp.array([0.3, 0.1, 0.2, 9.0]), jnp.array([1.0, 1, 1, 0])
    )
    alone = jax.tree.map(lambda leaf: leaf[:3], judged)
    for name, loss in JUDGED_LOSSES.items():
        gradient = jax.grad(lambda judged, loss=loss: (loss(judged) * judged.present).sum(), allow_int=True)(judged)
        assert (np.sign(gradient.answers.log_ratios) == [-1, 1, -1, 0]).all(), name
        close(loss(judged)[:3], loss(alone), name)


def test_bco_shifts_by_the_middle_of_both_kinds() -> None:
    ratios = jnp.array([3.0, 1.0, -1.0])
    judged = Judged(Answers(ratios, ratios, jnp.ones(3)), jnp.array([True, True, False]), jnp.zeros(3), jnp.ones(3))
    shift = (2.0 - 1.0) / 2
    wanted = [np.log1p(np.exp(-(3 - shift))), np.log1p(np.exp(-(1 - shift))), np.log1p(np.exp(-1 - shift))]
    close(JUDGED_LOSSES["bco"](judged, beta=1.0), wanted, "bco")
    one_kind = judged.replace(desirable=jnp.ones(3, bool))
    close(JUDGED_LOSSES["bco"](one_kind, beta=1.0), np.log1p(np.exp(-(np.asarray(ratios) - 1))), "one kind")


def test_bco_of_pairs_shifts_by_the_mean_of_all_their_rewards() -> None:
    """Two pairs and an empty place; the shift of 0.5 (3 + 1 + 1 - 2) / 2 is a constant."""
    one = jnp.ones(3)
    sides = [Answers(jnp.array(ratios), jnp.array(ratios), one) for ratios in ([3.0, 1.0, 50.0], [1.0, -2.0, 50.0])]
    pairs, shift = Pairs(*sides, jnp.array([1.0, 1.0, 0.0])), 0.75
    wanted = [np.log1p(np.exp(-(good - shift))) + np.log1p(np.exp(-(shift - bad))) for good, bad in ((3, 1), (1, -2))]
    close(PAIR_LOSSES["bco_pair"](pairs, beta=1.0)[:2], wanted, "bco_pair")


def test_sums_of_long_answers_keep_the_sign_of_a_small_log_ratio() -> None:
    """In order, float32 loses more than the ratio itself; pairwise it does not."""
    draw = np.random.default_rng(1)
    policy = draw.normal(-2, 1, 30_000).astype(np.float32)
    reference = policy - np.float32(1e-6)
    exact = (policy.astype(np.float64) - reference.astype(np.float64)).sum()
    got = float(pairwise_sum(jnp.asarray(policy) - jnp.asarray(reference)))
    assert got == pytest.approx(exact, rel=1e-5)
    exact_sum = policy.astype(np.float64).sum()
    in_order = abs(float(np.add.accumulate(policy)[-1]) - exact_sum)
    assert abs(float(pairwise_sum(jnp.asarray(policy))) - exact_sum) < 0.1 * in_order


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8])
def test_segments_are_summed_apart_and_padding_not_at_all(length: int) -> None:
    ids = np.array([[1] * length + [2, 2, 0], [1, 2] + [3] * (length + 1)])
    values = np.arange(2 * (length + 3), dtype=np.float32).reshape(2, -1)
    got = segment_sums(jnp.asarray(values), jnp.asarray(ids), 3)
    close(got, [[values[row][ids[row] == segment].sum() for segment in (1, 2, 3)] for row in range(2)], "sums")


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"robust: label_smoothing=0.5 must be .* below 0.5"):
        robust(some_pairs(2, 2), label_smoothing=0.5)
    with pytest.raises(ConfigError, match=r"exo_pair: label_smoothing=0 must be above 0"):
        exo_pair(some_pairs(2, 2), label_smoothing=0)
