"""The decoder: packing, rematerialisation, parity of the paged path (promise 1), independence of rows (promise 2)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import ModelConfig
from jaxrl.model.families import FAMILIES
from jaxrl.model.kv_pages import KVPages, init_pages
from jaxrl.model.logprob import logits, sequence_logprobs
from jaxrl.model.spec import ParamSpec, initialize
from jaxrl.model.transformer import hidden_states, paged_hidden_states, param_specs

CONFIG = ModelConfig(
    vocab_size=64, layers=3, width=32, query_heads=4, kv_heads=2, head_width=8, ffn_width=48,
    sliding_window=11, sliding_layers=(1,),
)  # fmt: skip
PAGE = 4


def parameters(config: ModelConfig, seed: int = 0) -> dict:
    """Fresh parameters, norms and biases moved off their initial values so that they matter."""
    specs, generator = param_specs(config), np.random.default_rng(seed)

    def move(x: jax.Array, spec: ParamSpec) -> jax.Array:
        return x if spec.decay else x + jnp.asarray(generator.normal(size=x.shape) * 0.2, x.dtype)

    return jax.tree.map(move, initialize(specs, jax.random.key(seed)), specs)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=4)
def paged_step(
    params: dict, config: ModelConfig, tokens: jax.Array, positions: jax.Array, pages: KVPages, table: jax.Array
) -> tuple[jax.Array, KVPages]:
    hidden, pages = paged_hidden_states(params, config, tokens, positions, pages, table)
    return logits(params, config, hidden), pages


def decode_logprobs(params: dict, config: ModelConfig, tokens: np.ndarray, chunk: int, prefilled: int) -> np.ndarray:
    """Log-probabilities of tokens[:, 1:] by chunked prefill of the first ``prefilled`` tokens, then one by one."""
    rows, count = tokens.shape
    table = np.random.default_rng(2).permutation(rows * 16).reshape(rows, 16).astype(np.int32)
    pages = init_pages(config, rows * 16, PAGE)
    outputs = []
    cuts = [*range(0, prefilled, chunk), *range(prefilled, count)]
    for left, right in zip(cuts, [*cuts[1:], count], strict=True):
        width = chunk if right <= prefilled else 1
        piece, positions = np.zeros((rows, width), np.int32), np.full((rows, width), -1, np.int32)
        piece[:, : right - left], positions[:, : right - left] = tokens[:, left:right], np.arange(left, right)
        step, pages = paged_step(params, config, piece, positions, pages, table)
        outputs.append(step[:, : right - left])
    scores = jax.nn.log_softmax(jnp.concatenate(outputs, axis=1)[:, :-1])
    return np.asarray(jnp.take_along_axis(scores, jnp.asarray(tokens)[:, 1:, None], axis=-1))[..., 0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "scale", "largest", "mean"),
    [("float32", 0.1, 1e-5, 2e-6), ("bfloat16", 0.02, 2e-3, 1e-4), ("bfloat16", 0.1, 2e-2, 1e-3)],
)
def test_promise_1_decoding_and_training_give_the_same_logprobs(
    family: str, dtype: str, scale: float, largest: float, mean: float
) -> None:
    """With every feature that a ModelConfig can have, whether models of the family have it or not."""
    config = dataclasses.replace(
        CONFIG, family=family, compute_dtype=dtype, init_scale=scale, tie_embeddings=family == "qwen2", score_width=5,
        attention_soft_cap=2.0, logit_soft_cap=3.0, rope_scaling="llama3", rope_factor=4.0, rope_trained_positions=16,
        local_rope_theta=20.0, experts=6 if FAMILIES[family].experts else 0, expert_width=20,
    )  # fmt: skip
    params = parameters(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (5, 44)).astype(np.int32)
    positions, segment_ids = np.broadcast_to(np.arange(44), tokens.shape), np.ones_like(tokens)
    stats = jax.jit(sequence_logprobs, static_argnums=1)(params, config, tokens, positions, segment_ids)
    decoded = decode_logprobs(params, config, tokens, chunk=16, prefilled=27)
    difference = np.abs(decoded - stats.logprobs[:, 1:])
    assert difference.max() < largest and difference.mean() < mean


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("slots", "count", "experts"), [(8, 1, 0), (16, 1, 0), (64, 1, 0), (4, 8, 0), (8, 1, 6), (64, 1, 6), (4, 8, 6)]
)
def test_promise_2_a_row_is_bit_identical_in_every_slot_and_company(
    slots: int, count: int, experts: int, dtype: str
) -> None:
    config = dataclasses.replace(CONFIG, compute_dtype=dtype, experts=experts, expert_width=20)
    params = parameters(config)
    generator = np.random.default_rng(slots)
    own_tokens = generator.integers(0, config.vocab_size, count)
    own_keys, own_values = generator.normal(size=(2, config.layers, 5, config.kv_heads, PAGE, config.head_width))
    results = []
    for slot, longest in ((0, 20), (slots - 1, -1), (slots // 2, 63), (1, 63)):
        table = generator.permutation(slots * 16).reshape(slots, 16).astype(np.int32)
        shape = (2, config.layers, slots * 16, config.kv_heads, PAGE, config.head_width)
        keys, values = generator.normal(size=shape)
        keys[:, table[slot, :5]], values[:, table[slot, :5]] = own_keys, own_values
        pages = KVPages(keys=jnp.asarray(keys, dtype), values=jnp.asarray(values, dtype))
        tokens = generator.integers(0, config.vocab_size, (slots, count)).astype(np.int32)
        last = generator.integers(-1, longest, size=slots, endpoint=True)
        tokens[slot], last[slot] = own_tokens, 18
        positions = np.maximum(last[:, None] - np.arange(count)[::-1], -1).astype(np.int32)
        step, _ = paged_step(params, config, tokens, positions, pages, table)
        results.append(np.asarray(step)[slot])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_padding_tokens_write_nowhere_and_tokens_write_only_their_place() -> None:
    params = parameters(CONFIG)
    pages = KVPages(*(jnp.full_like(x, 7.0) for x in jax.tree.leaves(init_pages(CONFIG, 6, PAGE))))
    table = np.array([[4, 1], [2, 0]], np.int32)
    positions = np.array([[3, 4, -1], [-1, -1, -1]], np.int32)
    _, written = paged_step(params, CONFIG, np.ones((2, 3), np.int32), positions, pages, table)
    changed = np.argwhere((np.asarray(written.keys) != 7.0).any(axis=(0, 2, 4)))
    assert changed.tolist() == [[1, 0], [4, 3]]  # (page, offset) of positions 4 and 3 of row 0


def test_the_pages_are_updated_in_place() -> None:
    pages = jax.eval_shape(lambda: init_pages(CONFIG, 4096, PAGE))
    arguments = [jax.ShapeDtypeStruct((2, 1), jnp.int32), jax.ShapeDtypeStruct((2, 1), jnp.int32)]
    table = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    compiled = paged_step.lower(jax.eval_shape(lambda: parameters(CONFIG)), CONFIG, *arguments, pages, table).compile()
    memory = compiled.memory_analysis()
    size = 2 * pages.keys.size * pages.keys.dtype.itemsize
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size // 8


def test_packed_rows_equal_separate_rows_in_values_and_gradients() -> None:
    params = parameters(CONFIG)
    generator = np.random.default_rng(4)
    pieces = [generator.integers(0, CONFIG.vocab_size, length).astype(np.int32) for length in (9, 14, 5)]
    packed = np.zeros((1, 32), np.int32)
    positions, segment_ids = np.zeros_like(packed), np.zeros_like(packed)
    apart, apart_positions, apart_segments = (np.zeros((3, 16), np.int32) for _ in range(3))
    left = 0
    for index, piece in enumerate(pieces):
        place = slice(left, left + len(piece))
        packed[0, place], positions[0, place], segment_ids[0, place] = piece, np.arange(len(piece)), index + 1
        apart[index, : len(piece)], apart_positions[index, : len(piece)] = piece, np.arange(len(piece))
        apart_segments[index, : len(piece)] = 1
        left += len(piece)

    def total(params: dict, *batch: np.ndarray) -> tuple[jax.Array, jax.Array]:
        stats = sequence_logprobs(params, CONFIG, *batch)
        return jnp.sum(stats.logprobs) - 0.5 * jnp.sum(stats.entropy), stats.logprobs

    gradient = jax.jit(jax.value_and_grad(total, has_aux=True))
    (one, logprobs), one_gradient = gradient(params, packed, positions, segment_ids)
    (other, _), other_gradient = gradient(params, apart, apart_positions, apart_segments)
    assert float(one) == pytest.approx(float(other), rel=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4, rtol=1e-4), one_gradient, other_gradient)
    unpredicted = np.flatnonzero((positions[0] == 0) | (segment_ids[0] == 0))
    assert not np.asarray(logprobs)[0, unpredicted].any()
    assert (np.asarray(logprobs)[0, [1, 10, 24]] < 0).all()


def test_rematerialisation_changes_memory_but_not_gradients() -> None:
    ones = np.ones((2, 128), np.int32)
    batch = (ones, np.arange(128, dtype=np.int32)[None].repeat(2, axis=0), ones)
    compiled = {}
    for remat in ("none", "dots", "full"):
        config = dataclasses.replace(CONFIG, remat=remat, layers=8, sliding_layers=())
        params = parameters(config)

        def loss(params: dict, config: ModelConfig = config) -> jax.Array:
            return jnp.sum(hidden_states(params, config, *batch) ** 2)

        compiled[remat] = jax.jit(jax.grad(loss)).lower(params).compile()
    gradients = {remat: run(params) for remat, run in compiled.items()}
    for remat in ("dots", "full"):
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3)
        jax.tree.map(close, gradients[remat], gradients["none"])
    memory = {remat: run.memory_analysis().temp_size_in_bytes for remat, run in compiled.items()}
    assert memory["full"] < memory["dots"] < memory["none"]
