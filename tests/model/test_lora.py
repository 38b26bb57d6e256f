"""Adapters: what they add, that decoding and training agree with them (promises 1 and 2), and what they cannot be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import ConfigError, LoraConfig, ModelConfig
from jaxrl.model import lora
from jaxrl.model.families import FAMILIES
from jaxrl.model.kv_pages import init_pages
from jaxrl.model.logprob import logits, sequence_logprobs
from jaxrl.model.spec import count, decay_mask, initialize
from jaxrl.model.transformer import hidden_states, paged_hidden_states, param_specs

MODEL = ModelConfig(
    family="qwen2", vocab_size=40, layers=3, width=32, query_heads=4, kv_heads=2, head_width=6, ffn_width=48,
    init_scale=0.2, sliding_window=7, sliding_layers=(1,), tie_embeddings=False,
)  # fmt: skip
MOE = dataclasses.replace(MODEL, family="qwen3_moe", experts=6, experts_per_token=2, expert_width=20)
MIXED = dataclasses.replace(MOE, dense_layers=(1,))
CONFIG = LoraConfig(rank=4, alpha=6.0)
EVERYTHING = LoraConfig(rank=4, alpha=6.0, targets=("all-linear", "embed_tokens", "lm_head"))
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (5, 20)).astype(np.int32)
POSITIONS, SEGMENTS = np.broadcast_to(np.arange(20, dtype=np.int32), TOKENS.shape), np.ones_like(TOKENS)
PAGE = 4


def random_adapters(model: ModelConfig, config: LoraConfig, seed: int = 3) -> lora.Adapters:
    generator = np.random.default_rng(seed)
    specs = lora.adapter_specs(param_specs(model), config)
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * generator.normal(size=leaf.shape), leaf.dtype), specs)


def base_of(model: ModelConfig, config: LoraConfig) -> lora.Base:
    return lora.Base(initialize(param_specs(model), jax.random.key(0)), lora.scale_of(config))


score = jax.jit(sequence_logprobs, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1)
def all_logits(params: dict, model: ModelConfig) -> jax.Array:
    return logits(params, model, hidden_states(params, model, TOKENS, POSITIONS, SEGMENTS))


@functools.partial(jax.jit, static_argnums=1, donate_argnums=4)
def paged_step(params, model, tokens, positions, pages, table):
    hidden, pages = paged_hidden_states(params, model, tokens, positions, pages, table)
    return logits(params, model, hidden), pages


def decoded_logprobs(params: dict, model: ModelConfig, prefilled: int) -> np.ndarray:
    """Log-probabilities of TOKENS[:, 1:]: one prefill, then token by token."""
    rows, length = TOKENS.shape
    table = np.random.default_rng(2).permutation(rows * 5).reshape(rows, 5).astype(np.int32)
    pages, outputs = init_pages(model, rows * 5, PAGE), []
    for left, right in [(0, prefilled), *((at, at + 1) for at in range(prefilled, length))]:
        step, pages = paged_step(params, model, TOKENS[:, left:right], POSITIONS[:, left:right], pages, table)
        outputs.append(step)
    scores = jax.nn.log_softmax(jnp.concatenate(outputs, axis=1)[:, :-1])
    return np.asarray(jnp.take_along_axis(scores, TOKENS[:, 1:, None], axis=-1))[..., 0]


@pytest.mark.parametrize(
    ("family", "dtype"), [("qwen2", "float32"), ("qwen2", "bfloat16"), ("gemma2", "float32"), ("qwen3_moe", "float32")]
)
def test_promise_1_decoding_and_training_agree_with_adapters(family: str, dtype: str) -> None:
    experts = 6 if FAMILIES[family].experts else 0
    model = dataclasses.replace(
        MODEL, family=family, compute_dtype=dtype, param_dtype=dtype, experts=experts, expert_width=20
    )
    params = base_of(model, EVERYTHING).adapted(random_adapters(model, EVERYTHING))
    trained = score(params, model, TOKENS, POSITIONS, SEGMENTS).logprobs
    tolerance = 1e-5 if dtype == "float32" else 2e-3
    np.testing.assert_allclose(decoded_logprobs(params, model, 9), trained[:, 1:], atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_promise_2_a_row_is_bit_identical_in_every_slot_and_company(dtype: str) -> None:
    model, generator = dataclasses.replace(MODEL, compute_dtype=dtype), np.random.default_rng(5)
    params = base_of(model, CONFIG).adapted(random_adapters(model, CONFIG))
    results = []
    for slot in (0, 3, 7):
        tokens = generator.integers(0, model.vocab_size, (8, 4)).astype(np.int32)
        tokens[slot] = [1, 2, 3, 4]
        positions = np.broadcast_to(np.arange(4, dtype=np.int32), (8, 4))
        table = generator.permutation(8).reshape(8, 1).astype(np.int32)
        step, _ = paged_step(params, model, tokens, positions, init_pages(model, 8, PAGE), table)
        results.append(np.asarray(step)[slot])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize(
    ("model", "targets", "rank_stabilized"),
    [
        (MODEL, ("all-linear",), True),
        (MODEL, ("query", "mlp.down_proj"), False),
        (MODEL, ("embed_tokens", "lm_head"), False),
        (MOE, ("gate_proj",), False),
        (MIXED, ("all-linear", "embedding", "head"), False),
    ],
)
def test_factored_and_merged_adapters_are_the_same_function(
    model: ModelConfig, targets: tuple[str, ...], rank_stabilized: bool
) -> None:
    config = dataclasses.replace(CONFIG, targets=targets, rank_stabilized=rank_stabilized)
    base, adapters = base_of(model, config), random_adapters(model, config)
    factored, merged = base.adapted(adapters), base.merged(adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(base.params)
    np.testing.assert_allclose(all_logits(merged, model), all_logits(factored, model), atol=2e-4)
    if "head" in adapters:
        stats, of_merged = (score(params, model, TOKENS, POSITIONS, SEGMENTS) for params in (factored, merged))
        np.testing.assert_allclose(stats.logprobs, of_merged.logprobs, atol=2e-4)
    assert np.abs(all_logits(base.params, model) - all_logits(factored, model)).max() > 0.05


def test_merging_is_float32_and_rounds_once() -> None:
    model = dataclasses.replace(MODEL, param_dtype="bfloat16")
    base, adapters = base_of(model, CONFIG), random_adapters(model, CONFIG)
    merged = base.merged(adapters)
    for name, pair in adapters.items():
        weight = np.asarray(base.params["layers"][name], np.float64)
        first, second = (np.asarray(pair[part], np.float64) for part in (lora.A, lora.B))
        layers, rank = first.shape[0], first.shape[-1]
        added = np.einsum("lir,lro->lio", first.reshape(layers, -1, rank), second.reshape(layers, rank, -1))
        exact = weight + 6.0 / 4 * added.reshape(weight.shape)
        assert merged["layers"][name].dtype == jnp.bfloat16
        off = np.asarray(merged["layers"][name], np.float64) - exact
        assert (np.abs(off) <= np.abs(exact) * 2.0**-8 * 1.001 + 1e-6).all(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_adapters_change_no_bit(dtype: str) -> None:
    model = dataclasses.replace(MODEL, param_dtype=dtype, compute_dtype=dtype)
    base = base_of(model, EVERYTHING)
    fresh = initialize(lora.adapter_specs(param_specs(model), EVERYTHING), jax.random.key(1))
    np.testing.assert_array_equal(all_logits(base.adapted(fresh), model), all_logits(base.params, model))


def test_an_update_below_the_rounding_of_a_weight_counts_in_full() -> None:
    model = dataclasses.replace(MODEL, param_dtype="bfloat16")
    base, specs = base_of(model, CONFIG), lora.adapter_specs(param_specs(model), CONFIG)
    fresh = initialize(specs, jax.random.key(1))
    moved = jax.tree.map(lambda leaf, spec: leaf + 1e-4 * ("lora_B" in spec.hf_name), fresh, specs)
    exact = base.replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base.params))
    before = all_logits(base.params, model)
    wanted = all_logits(exact.merged(moved), model) - before
    assert np.abs(wanted).max() > 1e-4
    np.testing.assert_allclose(
        all_logits(base.adapted(moved), model) - before, wanted, atol=0.05 * np.abs(wanted).max()
    )
    unchanged = base.params["layers"]["gate"] == base.merged(moved)["layers"]["gate"]
    assert np.mean(np.asarray(unchanged)) > 0.9


def test_the_table_has_the_usual_initial_values_and_few_parameters() -> None:
    specs = lora.adapter_specs(param_specs(MODEL), CONFIG)
    fresh = initialize(specs, jax.random.key(0))
    inputs = {"query": 32, "key": 32, "value": 32, "output": 24, "gate": 32, "up": 32, "down": 48}
    assert set(specs) == set(inputs)
    for name, length in inputs.items():
        first, second = fresh[name][lora.A], fresh[name][lora.B]
        assert first.dtype == second.dtype == jnp.float32
        assert not second.any()
        assert 0.9 * length**-0.5 < np.abs(first).max() <= length**-0.5
        assert np.std(first) == pytest.approx((3 * length) ** -0.5, rel=0.1)
    assert count(specs) < 0.5 * count(param_specs(MODEL))
    assert all(jax.tree.leaves(decay_mask(specs)))
    bfloat16 = lora.adapter_specs(param_specs(dataclasses.replace(MODEL, param_dtype="bfloat16")), CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves(bfloat16)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("targets", "matrices"),
    [
        (("q_proj", "v_proj"), {"query", "value"}),
        (("self_attn.o_proj",), {"output"}),
        (("gate", "up_proj"), {"gate", "up"}),
        (("key", "k_proj", "all-linear"), {"query", "key", "value", "output", "gate", "up", "down"}),
    ],
)
def test_targets_are_names_here_or_ends_of_module_paths(targets: tuple[str, ...], matrices: set[str]) -> None:
    assert set(lora.adapter_specs(param_specs(MODEL), dataclasses.replace(CONFIG, targets=targets))) == matrices


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("qproj", r"LoraConfig.targets has 'qproj', which names no matrix .* did you mean q_proj"),
        ("quary", r"did you mean query"),
        ("proj", r"'proj', which names no matrix"),
        ("embedings", r"did you mean embedding.* choose from all-linear and: query \(self_attn.q_proj\)"),
        ("query_bias", r"did you mean query"),
    ],
)
def test_a_target_that_names_nothing_is_refused_with_the_nearest(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lora.adapter_specs(param_specs(MODEL), dataclasses.replace(CONFIG, targets=("query", target)))


def test_every_expert_has_its_own_pair_and_their_router_none() -> None:
    specs, attention = param_specs(MOE), {"query", "key", "value", "output"}
    experts = {"expert_gate": (32, 20), "expert_up": (32, 20), "expert_down": (20, 32)}
    table = lora.adapter_specs(specs, CONFIG)
    assert set(table) == attention | set(experts)
    fresh = initialize(table, jax.random.key(0))
    for name, (inputs, outputs) in experts.items():
        assert table[name][lora.A].shape == (3, 6, inputs, 4) and table[name][lora.B].shape == (3, 6, 4, outputs)
        assert 0.9 * inputs**-0.5 < np.abs(fresh[name][lora.A]).max() <= inputs**-0.5 and not fresh[name][lora.B].any()
        assert len(np.unique(fresh[name][lora.A][0, :, 0, 0])) == 6
    chosen = lora.adapter_specs(specs, dataclasses.replace(CONFIG, targets=("up_proj",)))
    assert set(chosen) == {"expert_up"}
    for target in ("router", "gate", "mlp.experts.0.up_proj"):
        with pytest.raises(ConfigError, match=f"{target}', which names no matrix that can have an adapter"):
            lora.adapter_specs(specs, dataclasses.replace(CONFIG, targets=(target,)))


def test_embedding_and_head_are_asked_for_by_name_and_only_where_they_are_two() -> None:
    assert not {"embedding", "head"} & set(lora.adapter_specs(param_specs(MODEL), CONFIG))
    both = dataclasses.replace(CONFIG, targets=("model.embed_tokens", "lm_head"))
    table = lora.adapter_specs(param_specs(MODEL), both)
    fresh = initialize(table, jax.random.key(0))
    assert fresh["embedding"][lora.A].shape == (40, 4) and fresh["embedding"][lora.B].shape == (4, 32)
    assert fresh["head"][lora.A].shape == (32, 4) and fresh["head"][lora.B].shape == (4, 40)
    assert not fresh["embedding"][lora.A].any() and 0.8 < np.std(fresh["embedding"][lora.B]) < 1.2
    tied = param_specs(dataclasses.replace(MODEL, tie_embeddings=True))
    for target in ("embed_tokens", "lm_head"):
        with pytest.raises(ConfigError, match=rf"'{target}'.* are one matrix here .*start from a folder that has both"):
            lora.adapter_specs(tied, dataclasses.replace(CONFIG, targets=(target,)))


def test_all_linear_is_what_peft_adapts_but_for_the_router() -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    shape = transformers.Qwen3MoeConfig(
        vocab_size=40, num_hidden_layers=1, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
        num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20, tie_word_embeddings=False,
    )  # fmt: skip
    settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    config = peft.get_peft_model(transformers.Qwen3MoeForCausalLM(shape), settings).peft_config["default"]
    ours = {
        lora.module(spec).rpartition(".")[2]
        for name, spec in lora.adaptable(param_specs(MOE)).items()
        if name in lora.adapter_specs(param_specs(MOE), CONFIG)
    }
    theirs = set(config.target_modules) | set(config.target_parameters)
    assert theirs - ours == {"gate.weight", "gate_up_proj"} and ours - theirs == {"gate_proj", "up_proj"}
