"""Run by test_ring_attention.py with eight virtual devices: prints a JSON line of what each case's ring gave.

``ring_process.py few`` is what tells most; ``all`` are the cases of whole rows.
"""

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxrl_kernels import interval_attention
from jaxrl_kernels.interval_attention.cases import CASES, Case

rings = importlib.import_module("jaxrl_kernels.ring_attention")

FEW = ("padded", "prefix_window", "bfloat16")
WHOLE_ROWS = tuple(case for case in CASES if case.first == 0 and case.tokens % 4 == 0)
CHUNKED = PartitionSpec(None, "ring")
WHOLE = PartitionSpec()


def ring(case: Case, devices: int, implementation: str) -> Callable[..., jax.Array]:
    """Attention of whole rows, cut over so many devices; its last two arguments are the mask's."""
    options = {"window": case.window, "scale": case.scale, "soft_cap": case.soft_cap, "axis": "ring"}

    def local(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, places: jax.Array) -> jax.Array:
        positions = places if case.by_position else None
        return rings.ring_attention(q, k, v, end, positions=positions, implementation=implementation, **options)

    mesh = jax.make_mesh((devices,), ("ring",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (CHUNKED, CHUNKED, CHUNKED, WHOLE, WHOLE)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=CHUNKED, check_vma=False)


def inputs(case: Case) -> tuple[jax.Array, ...]:
    """q, k, v, the output's gradient, ends and positions."""
    draw = np.random.default_rng(3)
    heads = (case.query_heads, case.kv_heads, case.kv_heads, case.query_heads)
    arrays = [draw.normal(size=(case.batch, case.tokens, count, case.head_width)) for count in heads]
    places = case.positions() if case.by_position else np.zeros((case.batch, case.tokens), np.int32)
    return *(jnp.asarray(x, case.dtype) for x in arrays), jnp.asarray(case.ends()), jnp.asarray(places)


def attended(run: Callable[..., jax.Array], given: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The output and the gradients of q, k and v."""
    q, k, v, gradient, *mask = given

    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        output, pull = jax.vjp(lambda q, k, v: run(q, k, v, *mask), q, k, v)
        return output, *pull(gradient)

    return jax.jit(both)(q, k, v)


def compared(case: Case, devices: int, implementation: str) -> dict[str, Any]:
    """Errors of the ring, and of one device that has the whole row, against float32."""
    options = {"window": case.window, "scale": case.scale, "soft_cap": case.soft_cap}

    def whole(backend: str) -> Callable[..., jax.Array]:
        def run(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, places: jax.Array) -> jax.Array:
            positions = places if case.by_position else None
            return interval_attention(q, k, v, end, positions=positions, implementation=backend, **options)

        return run

    given = inputs(case)
    exact = tuple(x.astype(jnp.float32) if x.dtype == case.dtype else x for x in given)
    wanted = attended(whole("reference"), exact)
    results = {"ours": attended(ring(case, devices, implementation), given), "one": attended(whole("xla"), given)}
    hidden = case.ends() == 0
    padding = max(float(jnp.abs(x[hidden].astype(jnp.float32)).max(initial=0.0)) for x in results["ours"])
    errors = {
        name: [float(jnp.abs(x.astype(jnp.float32) - y).max()) for x, y in zip(result, wanted, strict=True)]
        for name, result in results.items()
    }
    return {"case": case.name, "devices": devices, "implementation": implementation, "padding": padding, **errors}


def parts_computed(end: np.ndarray) -> int:
    """How many chunks all devices together attend to, forward."""
    counted = []
    plain = rings.interval_attention_with_lse

    def counting(*args: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
        jax.debug.callback(lambda: counted.append(1))
        return plain(*args, **options)

    case = Case("counted", "causal", batch=1, tokens=end.shape[1])
    q, k, v, _, _, places = inputs(case)
    rings.interval_attention_with_lse = counting
    try:
        jax.block_until_ready(jax.jit(ring(case, 8, "xla"))(q, k, v, jnp.asarray(end), places))
        jax.effects_barrier()
    finally:
        rings.interval_attention_with_lse = plain
    return len(counted)


def main(which: str) -> None:
    for case in WHOLE_ROWS:
        if which == "all" or case.name in FEW:
            print(json.dumps(compared(case, 4, "xla")), flush=True)
    if which == "all":
        print(json.dumps(compared(CASES[-1], 2, "tpu_interpreted")), flush=True)
        return
    tokens = 32
    masks = {
        "causal": np.full((1, tokens), tokens, np.int32),
        "own": (np.arange(tokens, dtype=np.int32) // 4 * 4 + 4)[None],
        "pairs": (np.arange(tokens, dtype=np.int32) // 8 * 8 + 8)[None],
    }
    print(json.dumps({"parts": {name: parts_computed(end) for name, end in masks.items()}}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
