"""Layers that differ: how they are taken together, and that a scan over their stacks is a loop over the layers."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.config import LoraConfig, ModelConfig
from jaxrl.model import lora, stacks
from jaxrl.model.logprob import sequence_logprobs
from jaxrl.model.spec import initialize
from jaxrl.model.transformer import param_specs

MODEL = ModelConfig(
    family="qwen3_moe", vocab_size=40, layers=5, width=32, query_heads=2, kv_heads=1, head_width=16, ffn_width=48,
    experts=4, expert_width=24, init_scale=0.2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ("ssss", [(0, "s", 4)]),
        ("dddd", [(0, "d", 4)]),
        ("dsss", [(0, "d", 1), (1, "s", 3)]),
        ("dsdsds", [(0, "ds", 3)]),
        ("ddsdds", [(0, "dds", 2)]),
        ("dsdsd", [(0, "ds", 2), (4, "d", 1)]),
        ("s", [(0, "s", 1)]),
    ],
)
def test_what_repeats_is_taken_together(kinds: str, wanted: list[tuple[int, str, int]]) -> None:
    found = stacks.runs(tuple(kind == "s" for kind in kinds))
    assert [(run.first, "".join("ds"[kind] for kind in run.kinds), run.repeats) for run in found] == wanted


@given(st.lists(st.booleans(), min_size=1, max_size=24))
def test_every_layer_is_in_one_run(kinds: list[bool]) -> None:
    found = stacks.runs(tuple(kinds))
    assert [layer for run in found for layer in run.layers] == list(range(len(kinds)))
    assert [kind for run in found for kind in run.kinds * run.repeats] == kinds


@settings(max_examples=12, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=9).filter(any))
def test_layers_are_scanned_in_order_with_their_own_parameters(kinds: list[bool]) -> None:
    """Layer by layer what was seen: the numbers on all its stacks name the layer."""
    config = dataclasses.replace(
        MODEL, layers=len(kinds), dense_layers=tuple(layer for layer, sparse in enumerate(kinds) if not sparse)
    )
    specs = param_specs(config)["layers"]
    numbers = {
        name: np.arange(len(kinds), dtype=np.float32)[list(spec.layers) if spec.layers else slice(None)]
        for name, spec in specs.items()
    }

    def layer(carry: jax.Array, scanned: tuple[dict, dict]) -> tuple[jax.Array, jax.Array | None]:
        own, constants = scanned
        assert ("router" in own) != ("gate" in own)
        carry = 3 * carry + sum(own.values()) / len(own) + constants["number"]
        return carry, own.get("router")

    constants = {"number": np.arange(len(kinds), dtype=np.float32), "absent": None}
    carry, routers = stacks.scan(layer, np.float32(0), numbers, config, constants)
    wanted = 0.0
    for number in range(len(kinds)):
        wanted = 3 * wanted + 2 * number
    assert float(carry) == pytest.approx(wanted)
    np.testing.assert_array_equal(routers, np.flatnonzero(kinds))


def test_layers_without_experts_are_a_dense_models() -> None:
    """With one expert that computes every token with weight 1, a layer with experts is one without."""
    tokens = np.random.default_rng(0).integers(0, 40, (2, 12)).astype(np.int32)
    rows = tokens, np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape), np.ones_like(tokens)
    dense = dataclasses.replace(MODEL, family="qwen3", experts=0)
    mixed = dataclasses.replace(
        MODEL, experts=1, experts_per_token=1, expert_width=MODEL.ffn_width, dense_layers=(0, 3)
    )
    params = initialize(param_specs(dense), jax.random.key(0))
    of_mixed, specs = initialize(param_specs(mixed), jax.random.key(1)), param_specs(mixed)["layers"]
    for name, leaf in params["layers"].items():
        if name in stacks.DENSE:
            of_mixed["layers"][name] = leaf[np.array(specs[name].layers)]
            of_mixed["layers"][f"expert_{name}"] = leaf[np.array(specs["router"].layers)][:, None]
        else:
            of_mixed["layers"][name] = leaf
    of_mixed |= {name: leaf for name, leaf in params.items() if name != "layers"}
    wanted, found = sequence_logprobs(params, dense, *rows), sequence_logprobs(of_mixed, mixed, *rows)
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)
    assert found.load.chosen.shape == (3, 1) and wanted.load is None


def test_adapters_are_those_of_the_layers_that_have_the_matrix() -> None:
    config = dataclasses.replace(MODEL, dense_layers=(1, 4))
    table = lora.adapter_specs(param_specs(config), LoraConfig(rank=2))
    assert table["gate"][lora.A].shape[0] == 2 and table["query"][lora.A].shape[0] == 5
    assert list(table["up"][lora.B].hf_names.values()) == [
        f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_B.weight" for layer in (1, 4)
    ]
