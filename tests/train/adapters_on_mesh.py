"""Updates, merges and hands over adapters on 2x2x2 devices and on one, and says whether they agree.

``adapters_on_mesh.py none|int8|nf4`` says how the weights beneath them are kept; with ``experts`` after it, the model
has some, the mesh an axis for them, and embedding and output head have adapters too.
"""

import dataclasses
import sys

import jax
import numpy as np

from jaxrl import mesh as meshes
from jaxrl.config import AlgorithmConfig, LoraConfig, MeshConfig, ModelConfig, OptimizerConfig
from jaxrl.model import lora, quantized, transformer
from jaxrl.model.spec import Specs, shardings
from jaxrl.records import Batch
from jaxrl.train.state import initial_params, new_state, rl_optimizer
from jaxrl.train.sync import rollout_base, with_adapters
from jaxrl.train.update import Updater, policy_gradient_loss

MODEL = ModelConfig(
    vocab_size=48, layers=2, width=128, query_heads=8, kv_heads=4, head_width=8, ffn_width=128, init_scale=0.06
)
CONFIG, MESH = LoraConfig(rank=3), MeshConfig(data=2, fsdp=2, tensor=2)
MOE = dataclasses.replace(
    MODEL, width=256, family="qwen3_moe", experts=4, experts_per_token=2, expert_width=64, tie_embeddings=False
)
EVERYTHING = dataclasses.replace(CONFIG, targets=("all-linear", "embed_tokens", "lm_head"))
EXPERT_MESH = MeshConfig(fsdp=2, expert=2, tensor=2)


def frozen(mesh: jax.sharding.Mesh, specs: Specs, kind: str) -> lora.Base:
    params = initial_params(specs, mesh, 0)
    if kind != "none":
        with jax.set_mesh(mesh):
            layers = {
                name: quantized.quantized(name, specs["layers"][name], leaf, kind)
                for name, leaf in params["layers"].items()
            }
        params = {**params, "layers": layers}
        for leaf, wanted in zip(
            jax.tree.leaves(params),
            jax.tree.leaves(shardings(quantized.quantized_specs(specs, kind), mesh, meshes.PARAM_RULES)),
            strict=True,
        ):
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (leaf.sharding, wanted)
    return lora.Base(params, lora.scale_of(CONFIG))


def main(kind: str, model: ModelConfig, config: LoraConfig, split_over: MeshConfig) -> None:
    specs = transformer.param_specs(model)
    adapter_specs = lora.adapter_specs(specs, config)
    generator, shape = np.random.default_rng(0), (8, 12)
    mask = np.ones(shape, np.float32)
    mask[:, 0] = 0
    batch = Batch.zeros(*shape).replace(
        tokens=generator.integers(0, model.vocab_size, shape).astype(np.int32),
        positions=np.broadcast_to(np.arange(12, dtype=np.int32), shape),
        segment_ids=np.ones(shape, np.int32),
        mask=mask,
        rl_weights=mask / 80,
        advantages=generator.normal(size=shape).astype(np.float32) * mask,
        behaviour_logprobs=-3 * mask,
        proximal_logprobs=-3 * mask,
    )
    results = []
    for mesh in (
        meshes.make_mesh(split_over),
        meshes.make_mesh(MeshConfig(), jax.devices()[:1]),
    ):
        # With so large an eps a gradient that is all rounding moves its weight by rounding, not by a whole step.
        optimizer = rl_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-3), adapter_specs)
        base = frozen(mesh, specs, kind)
        state = new_state(initial_params(adapter_specs, mesh, 1), optimizer, mesh)
        split = [
            sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(tree))
            for tree in (
                {name: ({**base.params, **base.params["layers"]})[name] for name in adapter_specs},
                state.params,
            )
        ]
        updater = Updater(policy_gradient_loss(model, AlgorithmConfig(), 1.0), optimizer, mesh, base=base)
        for _ in range(2):
            state, _ = updater.step(state, [batch])
        with jax.set_mesh(mesh):
            merged = base.merged(state.params)
        replicas = meshes.make_rollout_mesh(mesh)
        handed = with_adapters(rollout_base(base, model, replicas), state.params, adapter_specs, model, replicas)[0]
        results.append(jax.device_get((state.params, merged, handed)))
        if mesh.size > 1:
            print(f"split weights: {split[0]}, split adapters: {split[1]}")
    near = [
        all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.allclose(a, b, atol=2e-4)), one, other)))
        for one, other in zip(*results, strict=True)
    ]
    print(f"adapters near: {near[0]}, merged near: {near[1]}, handed over near: {near[2]}")


if __name__ == "__main__":
    if sys.argv[2:] == ["experts"]:
        main(sys.argv[1], MOE, EVERYTHING, EXPERT_MESH)
    else:
        main(sys.argv[1], MODEL, CONFIG, MESH)
