"""FLOPs of matrix products by hand: loops, layers computed again, shards, and experts."""

import jax
import jax.numpy as jnp
import pytest

from jaxrl.check.flops import Data, matrix_flops
from jaxrl_kernels import interval_attention

SQUARE = jnp.ones((4, 4))
ONE = 2 * 4 * 4 * 4


def flops(function, *arguments, turns: float = 1.0) -> float:
    return matrix_flops(jax.make_jaxpr(function)(*arguments), Data(turns))


def test_products_in_scans_are_counted_as_often_as_they_turn() -> None:
    def step(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
        return x @ weight, None

    assert flops(lambda x: jax.lax.scan(step, x, jnp.ones((5, 4, 4)))[0], SQUARE) == 5 * ONE


def test_what_is_computed_again_is_counted_again() -> None:
    def loss(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sin(x @ weight).sum()

    plain, again = jax.grad(loss, argnums=(0, 1)), jax.grad(jax.checkpoint(loss), argnums=(0, 1))
    assert flops(plain, SQUARE, SQUARE) == 3 * ONE
    assert flops(again, SQUARE, SQUARE) == 4 * ONE


def test_only_an_innermost_loop_whose_end_the_data_decide_turns_as_often_as_said() -> None:
    def inner(x: jax.Array, end: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, end, lambda _, x: x @ SQUARE, x)

    def outer(x: jax.Array, end: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() < 1e9, lambda x: inner(x, end) @ SQUARE, x)

    assert flops(inner, SQUARE, jnp.int32(3), turns=7) == 7 * ONE
    assert flops(outer, SQUARE, jnp.int32(3), turns=7) == 8 * ONE


def test_a_product_of_a_batch() -> None:
    assert flops(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), jnp.ones((3, 2, 5)), jnp.ones((3, 5, 7))) == 2 * 210


@pytest.mark.parametrize("differentiated", [False, True])
def test_a_row_meets_the_matrix_of_one_expert(differentiated: bool) -> None:
    rows, matrices, sizes = jnp.ones((6, 4)), jnp.ones((3, 4, 5)), jnp.array([1, 2, 3], jnp.int32)

    def product(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, matrices, sizes)

    one = 2 * 6 * 4 * 5
    if not differentiated:
        assert flops(product, rows, matrices) == one
        return
    gradient = jax.grad(lambda *both: jnp.sin(product(*both)).sum(), argnums=(0, 1))
    assert flops(gradient, rows, matrices) == 3 * one


def test_of_experts_held_here_only_their_share_of_the_rows_is_counted() -> None:
    """Eight experts, of which a token chooses two; four are here: two rows a token are held, one comes."""
    rows, matrices, sizes = jnp.ones((6, 4)), jnp.ones((4, 4, 5)), jnp.array([1, 1, 1, 0], jnp.int32)
    jaxpr = jax.make_jaxpr(lambda rows: jax.lax.ragged_dot(rows, matrices, sizes))(rows)
    assert matrix_flops(jaxpr, Data(experts=8, experts_per_token=2)) == 0.5 * matrix_flops(jaxpr, Data())
    assert matrix_flops(jaxpr, Data(experts=4, experts_per_token=2)) == matrix_flops(jaxpr, Data())


def test_a_kernel_counts_as_it_says_itself() -> None:
    """Attention over one whole row: half of all pairs, in two products forward and seven backward."""
    batch, tokens, heads, width = 2, 512, 4, 8
    q, end = jnp.ones((batch, tokens, heads, width)), jnp.full((batch, tokens), tokens, jnp.int32)

    def attend(q: jax.Array) -> jax.Array:
        return interval_attention(q, q[:, :, :2], q[:, :, 2:], end, implementation="tpu_interpreted").sum()

    one = 2 * batch * heads * tokens * tokens * width / 2
    assert flops(attend, q) == 2 * one
    assert flops(jax.grad(attend), q) == 9 * one
