"""Run by test_losses_on_mesh.py with eight virtual devices: every loss and correction on split rows and tokens.

Prints a JSON line with the largest difference to one device, by method.
"""

import json
from typing import Any

import jax
import numpy as np

from jaxrl.config import AlgorithmConfig, MeshConfig
from jaxrl.mesh import COMPUTE_RULES, make_mesh, partition_spec
from jaxrl.rl.correction import correction
from jaxrl.rl.mismatch import MISMATCH, REJECTIONS
from jaxrl.rl.policy_losses import POLICY_LOSSES
from jaxrl.rl.tokens import sampled

SHAPE = (8, 12)
CONFIG = AlgorithmConfig(proximal="recomputed", mismatch="icepop", rejection="divergence", top_entropy=0.8)


def inputs() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    arrays = {
        name: draw.normal(size=SHAPE).astype(np.float32) * 0.2 - 1 for name in ("logprobs", "proximal", "sampler")
    }
    arrays |= {"advantages": draw.normal(size=SHAPE).astype(np.float32), "entropy": draw.random(SHAPE, np.float32)}
    arrays["segment_ids"] = np.repeat([[1] * 5 + [2] * 6 + [0]], SHAPE[0], axis=0).astype(np.int32)
    arrays["mask"] = (draw.random(SHAPE) < 0.7).astype(np.float32) * (arrays["segment_ids"] > 0)
    return arrays


def results(arrays: dict[str, Any]) -> dict[str, Any]:
    """Values of every method, and gradients of every loss."""
    record = {
        "proximal_logprobs": arrays["proximal"],
        "behaviour_logprobs": arrays["sampler"],
        **{name: arrays[name] for name in ("advantages", "segment_ids", "entropy")},
    }
    correct = correction(CONFIG)

    def corrected(name: str, logprobs: jax.Array) -> jax.Array:
        kept = correct(sampled(arrays["mask"], logprobs, **record))
        return (arrays["mask"] * kept.weights * POLICY_LOSSES[name](kept.tokens).loss).sum()

    plain = sampled(arrays["mask"], arrays["logprobs"], **record)
    found = {name: method(plain) for name, method in {**MISMATCH, **REJECTIONS}.items()}
    slopes = {name: jax.grad(lambda x, name=name: corrected(name, x))(arrays["logprobs"]) for name in POLICY_LOSSES}
    return {**found, **slopes, **{name: total for name, (total, _) in correct(plain).metrics.items()}}


def main() -> None:
    alone = jax.device_get(jax.jit(results)(inputs()))
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    split = jax.sharding.NamedSharding(mesh, partition_spec(("batch", None), COMPUTE_RULES, mesh))
    with jax.set_mesh(mesh):
        together = jax.device_get(jax.jit(results)(jax.device_put(inputs(), split)))
    print(json.dumps({name: float(np.abs(together[name] - alone[name]).max()) for name in alone}))


if __name__ == "__main__":
    main()
