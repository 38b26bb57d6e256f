"""Which masks go to cuDNN: its plan, and what decides in the program. The case table stands with the other backends."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_kernels import Plan
from jaxrl_kernels.interval_attention import cudnn, interval_attention
from jaxrl_kernels.interval_attention.cases import CASES
from jaxrl_kernels.interval_attention.plan import KeyBlocks
from tests.kernels import cudnn_stand_in

cudnn_stand_in.install()

ROWS, TOKENS = 2, 12
LONGEST = 200


def by_loops(end: np.ndarray) -> list[tuple[int, int]] | None:
    """First token (of all rows) and length of every segment of a mask; None where it is not one of segments."""
    tokens = end.shape[1]
    query, key = np.arange(tokens)[:, None], np.arange(tokens)[None, :]
    found = []
    for row, ends in enumerate(end):
        visible = (key <= query) & (query < ends)
        wanted, left = np.zeros_like(visible), 0
        while left < tokens:
            right = left
            while right < tokens and visible[right, left]:
                right += 1
            if right > left:
                wanted[left:right, left:right] = np.tril(np.ones((right - left, right - left), bool))
                found.append((row * tokens + left, right - left))
            left = max(right, left + 1)
        if not np.array_equal(visible, wanted):
            return None
    return found


segments = jax.jit(cudnn.segments_of)


@st.composite
def ends(draw: st.DrawFn) -> np.ndarray:
    """Rows of segments and padding, in half of which any one token's end is another than it was."""
    end = np.zeros((ROWS, TOKENS), np.int32)
    for row in end:
        edges = sorted({0, TOKENS, *draw(st.lists(st.integers(1, TOKENS - 1), max_size=5))})
        for left, right in itertools.pairwise(edges):
            row[left:right] = draw(st.sampled_from([0, right, right, right]))
    if draw(st.booleans()):
        end[draw(st.integers(0, ROWS - 1)), draw(st.integers(0, TOKENS - 1))] = draw(st.integers(0, TOKENS + 2))
    return end


@given(ends())
@settings(max_examples=300, deadline=None)
def test_a_plan_lists_the_segments_iff_the_mask_has_no_others(end: np.ndarray) -> None:
    got, wanted = segments(jnp.asarray(end)), by_loops(end)
    assert bool(got.alone[0, 0]) == bool(wanted)  # a mask of nothing is the other way's, which has nothing to do
    if wanted:
        room = got.starts.shape[1] - len(wanted)
        np.testing.assert_array_equal(got.starts[0], [start for start, _ in wanted] + [ROWS * TOKENS] * room)
        np.testing.assert_array_equal(got.lengths[0], [length for _, length in wanted] + [0] * room)
        assert int(got.longest[0, 0]) == max(length for _, length in wanted)


def test_the_masks_of_the_case_table_go_where_they_belong() -> None:
    shape = ROWS, 24
    cases = [case for case in CASES if case.ends().shape == shape]
    assert {case.mask for case in cases} == {"causal", "segments", "padded", "prefix", "tree", "nothing"}
    for case in cases:
        alone = bool(segments(jnp.asarray(case.ends())).alone[0, 0])
        assert alone == (case.mask in ("causal", "segments", "padded")), case.name


def test_more_segments_than_there_is_room_for_go_the_other_way() -> None:
    rows, tokens = 2, 80
    room = rows * cudnn.MOST
    end = np.arange(1, tokens + 1, dtype=np.int32)[None].repeat(rows, axis=0)
    end[:, cudnn.MOST :] = tokens
    assert not segments(jnp.asarray(end)).alone[0, 0]  # one more in either row
    end[0, cudnn.MOST - 2 :] = tokens
    assert segments(jnp.asarray(end)).alone[0, 0]  # as many as there may be, though not equally in both
    assert segments(jnp.asarray(end)).starts.shape == (1, room)


@pytest.mark.parametrize(("rows", "tokens", "room"), [(1, 4096, 32), (4, 32768, 32), (1, 32768, 16), (2, 8192, 64)])
def test_room_shrinks_as_rows_grow(rows: int, tokens: int, room: int) -> None:
    shape = jax.eval_shape(cudnn.segments_of, jax.ShapeDtypeStruct((rows, tokens), jnp.int32))
    assert shape.starts.shape == (1, room)


@functools.cache
def compiled(soft_cap: float) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Output and the gradient of keys and values."""

    def both(q: jax.Array, k: jax.Array, end: jax.Array, window: int, positions: jax.Array | None, plan: Plan) -> tuple:
        def run(k: jax.Array) -> jax.Array:
            options = {"window": window, "positions": positions, "soft_cap": soft_cap}
            return interval_attention(q, k, k, end, **options, plan=plan)

        output, pull = jax.vjp(run, k)
        return output, pull(output)[0]

    return jax.jit(both)


def by_cudnn(window: int = 0, positions: jax.Array | None = None, soft_cap: float = 0.0) -> tuple[bool, bool]:
    """Whether the forward pass, and whether the backward pass, is cuDNN's: the other way has an emptied plan here, with
    which it gives zeros (for rows of several blocks)."""
    tokens, generator = 300, np.random.default_rng(0)
    q, k = (jnp.asarray(generator.normal(size=(ROWS, tokens, heads, 8)), jnp.float32) for heads in (4, 2))
    end = jnp.asarray([[120] * 120 + [300] * 180, [LONGEST] * LONGEST + [0] * (tokens - LONGEST)], jnp.int32)
    plan = cudnn.make_plan(end)
    emptied = KeyBlocks(plan.blocks.keys, jnp.zeros_like(plan.blocks.counts))
    given = q, k, end, window, positions
    wanted = compiled(soft_cap)(*given, Plan(plan.blocks, "xla"))
    found = []
    for ours, theirs in zip(
        compiled(soft_cap)(*given, Plan(plan._replace(blocks=emptied), "cudnn")), wanted, strict=True
    ):
        found.append(bool(np.asarray(ours).any()))
        if found[-1]:
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    return tuple(found)


@cudnn_stand_in.ON_A_CPU
def test_a_window_as_long_as_the_longest_segment_hides_nothing() -> None:
    assert by_cudnn() == by_cudnn(window=LONGEST) == (True, True)
    assert by_cudnn(window=LONGEST - 1) == (False, False)


@cudnn_stand_in.ON_A_CPU
def test_what_cudnn_does_not_compute_goes_the_other_way() -> None:
    positions = jnp.broadcast_to(3 * jnp.arange(300, dtype=jnp.int32), (ROWS, 300))
    assert by_cudnn(positions=positions) == (True, True)  # which nobody asks for without a window
    assert by_cudnn(positions=positions, window=LONGEST) == (False, False)
    with pytest.warns(UserWarning, match="'xla' computes what was planned for 'cudnn': a soft cap of 2.0"):
        assert by_cudnn(soft_cap=2.0) == (False, False)


def test_the_gradient_calls_cudnn_once_in_each_pass() -> None:
    def loss(q: jax.Array, k: jax.Array, end: jax.Array, window: jax.Array) -> jax.Array:
        plan = Plan(cudnn.make_plan(end), "cudnn")
        return interval_attention(q, k, k, end, window=window, plan=plan).astype(jnp.float32).sum()

    q, k = (jax.ShapeDtypeStruct((2, 1024, heads, 128), jnp.bfloat16) for heads in (8, 2))
    integers = jax.ShapeDtypeStruct((2, 1024), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(q, k, *integers)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert [program.count(f"@__cudnn$fmhaSoftmax{suffix}(") for suffix in ("", "Backward")] == [1, 1]
