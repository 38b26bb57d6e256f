"""Experts recorded by the sampler: of every token, and replayed they take the router's near ties out of the gap."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import ModelConfig
from jaxrl.model import kv_pages, moe, spec, transformer
from jaxrl.model.logprob import TokenStats, sequence_logprobs
from tests.rollout.conftest import CONFIG, MODEL, Played, make_engine, play_all

LONGEST = CONFIG.max_prompt_tokens + CONFIG.max_response_tokens
NAMES = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 1), (3, 0)]


def experts_model(dtype: str) -> ModelConfig:
    return dataclasses.replace(
        MODEL, family="qwen3_moe", experts=8, experts_per_token=3, expert_width=32, init_scale=0.15, compute_dtype=dtype
    )


def near_ties(params: dict) -> dict:
    """Experts that differ as before, but come in pairs between which the router hardly decides."""
    router = params["layers"]["router"]
    twins = router.at[..., 1::2].set(router[..., ::2] + 1e-5 * router[..., 1::2])
    return {**params, "layers": {**params["layers"], "router": twins}}


def score(
    params: dict, model: ModelConfig, played: Played, experts: np.ndarray | None
) -> tuple[TokenStats, np.ndarray]:
    """What the trainer makes of one episode, and the gap of its sampled tokens to the sampler."""
    row = np.concatenate([played.prompt, played.ids])
    padding = (0, LONGEST - len(row))
    if experts is not None:
        experts = np.pad(experts, (padding, (0, 0), (0, 0)), constant_values=-1)[None]
    positions = np.arange(LONGEST, dtype=np.int32)[None]
    segment_ids = (positions < len(row)).astype(np.int32)
    tokens = np.pad(row, padding)[None].astype(np.int32)
    stats = scored(params, model, tokens, positions, segment_ids, 1.0, experts)
    logprobs = np.asarray(stats.logprobs)[0, len(played.prompt) : len(row)]
    return stats, np.abs(logprobs - played.logprobs)[played.mask > 0]


scored = jax.jit(sequence_logprobs, static_argnums=1)


def test_every_token_but_the_last_is_recorded() -> None:
    """Prompts that a group shares, tool output, what was sampled, and what was preempted and prefilled again."""
    model = experts_model("float32")
    params = spec.initialize(transformer.param_specs(model), jax.random.key(0))
    engine = make_engine(params, model=model, record_experts=True, pages=26, reserve_quantile=0.1)
    engine._scheduler._recent.extend([1] * 20)
    for played in play_all(engine, NAMES).values():
        record = played.samples[-1].experts
        tokens = len(played.prompt) + len(played.ids)
        assert record.shape == (tokens, model.layers, 3) and record.dtype == np.int8
        assert (record[-1] == -1).all() and (record[:-1] >= 0).all()
        first = played.samples[0].experts
        np.testing.assert_array_equal(record[: len(first) - 1], first[:-1])
        own, _ = score(params, model, played, None)
        replayed, gap = score(params, model, played, record)
        np.testing.assert_array_equal(replayed.logprobs, own.logprobs)  # in float32 nothing is near a tie
        np.testing.assert_array_equal(replayed.load.chosen, own.load.chosen)
        assert gap.max() < 1e-5
        other = record.copy()
        other[0] = (other[0] + 1) % model.experts
        assert score(params, model, played, other)[1].max() > 1e-4
    assert engine.stats()["preemptions"] > 0


@pytest.mark.slow
def test_replaying_takes_the_near_ties_out_of_the_gap() -> None:
    model = dataclasses.replace(experts_model("bfloat16"), layers=4)
    params = near_ties(spec.initialize(transformer.param_specs(model), jax.random.key(0)))
    with_replay, without, moved = [], [], 0.0
    for played in play_all(make_engine(params, model=model, record_experts=True), NAMES).values():
        record = played.samples[-1].experts
        own, gap = score(params, model, played, None)
        without.append(gap)
        replayed, gap = score(params, model, played, record)
        with_replay.append(gap)
        moved += float(np.abs(replayed.load.chosen - own.load.chosen).sum()) / 2
    with_replay, without = np.concatenate(with_replay), np.concatenate(without)
    assert moved > 0, "the two choose differently somewhere"
    assert with_replay.mean() < 1e-3 and with_replay.max() < 2e-2, "promise 1, as for families without experts"
    assert with_replay.mean() < without.mean() / 3, (with_replay.mean(), without.mean())


def test_without_the_flag_nothing_is_recorded() -> None:
    assert kv_pages.init_pages(experts_model("float32"), 2, 4).experts is None


def test_recorded_experts_get_the_weights_of_the_present_router() -> None:
    config = experts_model("float32")
    generator = np.random.default_rng(0)
    x, router = (jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in ((2, 5, 64), (64, 8)))
    recorded = np.array([generator.permutation(8)[:3] for _ in range(10)]).reshape(2, 5, 3).astype(np.int8)
    recorded[0, 1] = -1
    own, choice = moe.route(router, x, config), moe.route(router, x, config, recorded=jnp.asarray(recorded))
    np.testing.assert_array_equal(choice.experts[0, 1], own.experts[0, 1])
    np.testing.assert_allclose(choice.weights[0, 1], own.weights[0, 1], rtol=1e-6)
    np.testing.assert_array_equal(choice.experts[1], recorded[1])
    exponents = np.exp(np.take_along_axis(np.asarray(x @ router), recorded.astype(int), axis=-1))[1]
    np.testing.assert_allclose(choice.weights[1], exponents / exponents.sum(axis=-1, keepdims=True), rtol=1e-4)


@pytest.mark.parametrize(("experts", "bits"), [(1, 8), (128, 8), (129, 16), (512, 16)])
def test_ids_are_as_small_as_they_can_be(experts: int, bits: int) -> None:
    info = np.iinfo(moe.id_type(experts))
    assert info.bits == bits and info.min < 0 and info.max >= experts - 1
