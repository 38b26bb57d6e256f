"""Run by test_linear_logprob.py with eight virtual devices: how far results and gradients are from one device."""

import functools
import json

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrl_kernels import linear_logprob
from jaxrl_kernels.linear_logprob import LinearLogprob
from jaxrl_kernels.linear_logprob.cases import Case
from tests.kernels.test_linear_logprob import differentiated, inputs

CASE = Case("split", tokens=12, rank=3, soft_cap=1.5, temperature=0.6)


def split(hidden: jax.Array, head: tuple[jax.Array, ...], targets: jax.Array, **options: float) -> LinearLogprob:
    """Tokens over one axis of two devices, the vocabulary over the other two."""
    axes = "outer", "inner"
    mesh = jax.make_mesh((2, 2, 2), ("rows", *axes), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    rows, whole = PartitionSpec("rows"), PartitionSpec()
    heads = PartitionSpec(axes), whole, PartitionSpec(None, axes)

    def score(hidden: jax.Array, head: tuple[jax.Array, ...], targets: jax.Array) -> LinearLogprob:
        assert head[0].shape[0] == CASE.vocabulary // 4
        return linear_logprob(hidden, head, targets, chunk=4, vocab_axis=axes, **options)

    sharded = jax.shard_map(score, mesh=mesh, in_specs=(rows, heads, rows), out_specs=rows, check_vma=False)
    return sharded(hidden, head, targets)


def main() -> None:
    one = differentiated(CASE, functools.partial(linear_logprob, chunk=4), inputs(CASE))
    several = differentiated(CASE, split, inputs(CASE))
    print(json.dumps([float(jnp.abs(x - y).max()) for x, y in zip(several, one, strict=True)]))


if __name__ == "__main__":
    main()
