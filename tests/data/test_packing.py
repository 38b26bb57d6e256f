"""Packing keeps every token of every text, exactly once, in fixed shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.config import ModelConfig
from jaxrl.data import packing
from jaxrl.model import logprob, spec, transformer
from jaxrl.records import Batch, Problem, StopReason, Trajectory
from jaxrl.rl.aggregation import aggregation_weights
from jaxrl.rl.policy_losses.clipped import ppo_clip
from jaxrl.rl.tokens import sampled

ROW_TOKENS = 16
lengths = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), max_size=20)  # prompt and response


def trajectory(sample: int, prompt: int, response: int, vocabulary: int = 1000) -> Trajectory:
    """Random contents that are a function of ``sample``; the last response token is always sampled, and of odd samples
    the experts are recorded."""
    rng = np.random.default_rng(sample)
    mask = rng.integers(0, 2, response).astype(np.int8)
    mask[-1:] = 1
    return Trajectory(
        problem=Problem(f"story/{sample}", "?", "1"),
        draw=3,
        sample=sample,
        prompt_ids=rng.integers(1, vocabulary, prompt).astype(np.int32),
        ids=rng.integers(1, vocabulary, response).astype(np.int32),
        mask=mask,
        logprobs=(-rng.random(response) * mask).astype(np.float32),
        versions=np.zeros(response, np.int32),
        turns=(),
        stop_reason=StopReason.ANSWERED,
        experts=rng.integers(0, 9, (prompt + response, 3, 2)).astype(np.int8) if sample % 2 else None,
    )


def segments_of(batches: list[Batch]) -> list[dict[str, np.ndarray]]:
    """Every segment of every row, cut out again by its id."""
    found = []
    for batch in batches:
        for row in range(len(batch.tokens)):
            ids = batch.segment_ids[row]
            for number in range(1, ids.max() + 1):
                places = np.flatnonzero(ids == number)
                assert (np.diff(places) == 1).all()
                found.append({name: values[row, places] for name, values in fields_of(batch).items()})
    return found


def fields_of(batch: Batch) -> dict[str, np.ndarray]:
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return {name: values for name, values in fields.items() if values is not None}


@given(lengths, st.integers(1, 5))
def test_every_token_of_every_trajectory_appears_once_with_its_values(shapes: list[tuple[int, int]], rows: int) -> None:
    trajectories = [trajectory(i, prompt, response) for i, (prompt, response) in enumerate(shapes)]
    advantages = [float(i) - 2.5 for i in range(len(shapes))]
    weights = aggregation_weights([t.mask for t in trajectories], "sequence")
    batches = packing.pack_trajectories(trajectories, advantages, weights, rows=rows, row_tokens=ROW_TOKENS)
    found = {segment["tokens"].tobytes(): segment for segment in segments_of(batches)}
    assert len(segments_of(batches)) == len(trajectories)
    for item, advantage, weight in zip(trajectories, advantages, weights, strict=True):
        segment = found[np.concatenate([item.prompt_ids, item.ids]).tobytes()]
        before = np.zeros(len(item.prompt_ids))
        np.testing.assert_array_equal(segment["positions"], np.arange(len(before) + len(item.ids)))
        np.testing.assert_array_equal(segment["mask"], [*before, *item.mask])
        for component, wanted in (("rl", weight), ("kl", weight), ("ce", 0 * weight)):
            np.testing.assert_array_equal(segment[f"{component}_weights"], [*before, *wanted])
        np.testing.assert_array_equal(segment["advantages"], [*before, *(advantage * item.mask)])
        np.testing.assert_array_equal(segment["behaviour_logprobs"], [*before, *item.logprobs])
        np.testing.assert_array_equal(segment["proximal_logprobs"], [*before, *item.logprobs])
        np.testing.assert_array_equal(segment["versions"], [*before, *item.versions])
        if item.experts is not None:
            np.testing.assert_array_equal(segment["experts"], item.experts)
        elif "experts" in segment:
            assert (segment["experts"] == -1).all()
    for batch in batches:
        for name, dtype in (("tokens", np.int32), ("positions", np.int32), ("segment_ids", np.int32)):
            assert getattr(batch, name).dtype == dtype
        for name, values in fields_of(batch).items():
            assert values.shape[:2] == (rows, ROW_TOKENS)
            assert (values[batch.segment_ids == 0] == (-1 if name == "experts" else 0)).all()
    sampled = sum(bool(t.mask.any()) for t in trajectories)
    assert sum(batch.rl_weights.sum() for batch in batches) == pytest.approx(float(sampled > 0), rel=1e-5)


@given(lengths, st.integers(1, 5), st.randoms(use_true_random=False))
def test_packing_does_not_depend_on_the_order_of_its_input(
    shapes: list[tuple[int, int]], rows: int, random: object
) -> None:
    def pack(order: list[int]) -> list[Batch]:
        trajectories = [trajectory(i, *shapes[i]) for i in order]
        weights = [t.mask * np.float32(0.1) for t in trajectories]
        return packing.pack_trajectories(
            trajectories, [i * 1.0 for i in order], weights, rows=rows, row_tokens=ROW_TOKENS
        )

    order = list(range(len(shapes)))
    first = pack(order)
    random.shuffle(order)
    jax.tree.map(np.testing.assert_array_equal, first, pack(order))


@given(st.lists(st.integers(1, ROW_TOKENS), min_size=1, max_size=40), st.integers(1, 5))
def test_rows_are_few_and_spread_evenly(sizes: list[int], rows: int) -> None:
    sequences = [(np.arange(size), np.zeros(size)) for size in sizes]
    batches = packing.pack_sequences(sequences, rows=rows, row_tokens=ROW_TOKENS)
    used = [int((batch.segment_ids.max(axis=1) > 0).sum()) for batch in batches]
    assert sum(used) < 2 * sum(sizes) / ROW_TOKENS + 1  # any two rows hold more than one row's worth of tokens
    assert len(batches) == -(-sum(used) // rows)
    assert max(used) - min(used) <= 1


def test_a_perfect_fit_is_found() -> None:
    sizes = [9, 7, 8, 8, 12, 4, 5, 11, 16]
    batches = packing.pack_sequences([(np.arange(n), np.zeros(n)) for n in sizes], rows=5, row_tokens=16)
    assert len(batches) == 1
    assert (batches[0].segment_ids > 0).all()


def test_nothing_packs_into_nothing() -> None:
    assert packing.pack_trajectories([], [], [], rows=2, row_tokens=8) == []
    assert packing.pack_sequences([], rows=2, row_tokens=8) == []


def test_advantages_may_be_given_for_every_token() -> None:
    item = trajectory(0, 2, 4)
    values = np.arange(4.0) + 1
    (batch,) = packing.pack_trajectories([item], [values], [item.mask], rows=1, row_tokens=8)
    np.testing.assert_array_equal(batch.advantages[0, 2:6], values * item.mask)


def test_a_trajectory_that_does_not_fit_is_named_with_limit_and_remedy() -> None:
    item = trajectory(5, 9, 8)
    with pytest.raises(ValueError) as error:
        packing.pack_trajectories([item], [0.0], [item.mask], rows=1, row_tokens=16)
    assert str(error.value) == (
        'problem "story/5" (draw 3, sample 5) has 17 tokens but a packed row holds row_tokens=16; '
        "raise TrainConfig.row_tokens or lower EngineConfig.max_response_tokens"
    )


def test_a_demonstration_that_does_not_fit_or_has_no_prompt_is_named() -> None:
    fits, too_long = (np.arange(4), np.array([0, 1, 1, 1])), (np.arange(9), np.zeros(9))
    with pytest.raises(ValueError, match="demonstration 1 has 9 tokens but .*row_tokens=8; raise SftConfig.row_tokens"):
        packing.pack_sequences([fits, too_long], rows=1, row_tokens=8)
    with pytest.raises(ValueError, match="first token of demonstration 0 is to be learned"):
        packing.pack_sequences([(np.arange(4), np.ones(4))], rows=1, row_tokens=8)


@pytest.mark.parametrize("update", ["all", "batch"])
def test_demonstration_weights_sum_to_one_over_an_update(update: str) -> None:
    rng = np.random.default_rng(0)
    sequences = []
    for _ in range(30):
        mask = rng.integers(0, 2, rng.integers(2, 12))
        mask[0] = 0
        sequences.append((rng.integers(1, 50, len(mask)), mask))
    batches = packing.pack_sequences(sequences, rows=4, row_tokens=16, update=update)
    assert len(batches) > 2
    assert sorted(s["tokens"].tobytes() for s in segments_of(batches)) == sorted(
        ids.astype(np.int32).tobytes() for ids, _ in sequences
    )
    assert sum(batch.mask.sum() for batch in batches) == sum(mask.sum() for _, mask in sequences)
    for batch in batches:
        np.testing.assert_array_equal(batch.ce_weights > 0, batch.mask > 0)
        assert len(np.unique(batch.ce_weights[batch.mask > 0])) == 1
    sums = [float(batch.ce_weights.sum()) for batch in batches]
    assert (sum(sums) if update == "all" else sums) == pytest.approx(1.0 if update == "all" else [1.0] * len(sums))


def test_promise_4_packed_is_unpacked_in_loss_and_gradients() -> None:
    model = ModelConfig(vocab_size=40, layers=2, width=16, query_heads=2, kv_heads=1, head_width=8, ffn_width=24)
    params = spec.initialize(transformer.param_specs(model), jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf * 5, params)  # far from uniform, so that leaks between segments would show
    shapes = [(3, 6), (2, 4), (5, 3), (4, 8), (2, 2)]
    trajectories = [trajectory(i, prompt, response, vocabulary=40) for i, (prompt, response) in enumerate(shapes)]
    advantages = [1.0, -0.5, 0.7, -1.2, 0.3]
    weights = aggregation_weights([t.mask for t in trajectories], "token")

    @jax.jit
    def gradient(params: dict, batch: Batch) -> tuple[jax.Array, dict]:
        def loss(params: dict) -> jax.Array:
            stats = logprob.sequence_logprobs(params, model, batch.tokens, batch.positions, batch.segment_ids)
            tokens = sampled(
                batch.mask,
                stats.logprobs,
                proximal_logprobs=batch.proximal_logprobs - 3.5,
                behaviour_logprobs=batch.behaviour_logprobs,
                advantages=batch.advantages,
                segment_ids=batch.segment_ids,
                entropy=stats.entropy,
            )
            surrogate = ppo_clip(tokens, clip_low=0.9, clip_high=9.0, dual_clip=0.0)
            return (batch.rl_weights * surrogate.loss).sum()

        return jax.value_and_grad(loss)(params)

    def total(batches: list[Batch]) -> tuple[jax.Array, dict]:
        return jax.tree.map(lambda *parts: sum(parts), *[gradient(params, batch) for batch in batches])

    # Packed: several trajectories to a row. Unpacked: a call for every trajectory, alone in the same shape.
    packed = packing.pack_trajectories(trajectories, advantages, weights, rows=2, row_tokens=20)
    alone = [
        batch
        for one in zip(trajectories, advantages, weights, strict=True)
        for batch in packing.pack_trajectories(*([part] for part in one), rows=2, row_tokens=20)
    ]
    assert len(packed) == 1
    assert (packed[0].segment_ids > 1).any()
    assert len(alone) == 5
    (loss, slopes), (loss_alone, slopes_alone) = total(packed), total(alone)
    assert abs(float(loss)) > 1e-2
    np.testing.assert_allclose(loss, loss_alone, rtol=1e-5)
    for slope, slope_alone in zip(jax.tree.leaves(slopes), jax.tree.leaves(slopes_alone), strict=True):
        assert float(jnp.abs(slope).max()) > 0
        np.testing.assert_allclose(slope, slope_alone, rtol=1e-4, atol=1e-5 * float(jnp.abs(slope).max()))
