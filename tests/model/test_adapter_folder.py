"""Adapters in PEFT's format: logits equal PEFT's in both directions, and what cannot be read is refused by name."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxrl.config import ConfigError, LoraConfig, ModelConfig
from jaxrl.model import hf, logprob, lora, transformer
from jaxrl.model.adapter_folder import CONFIG, WEIGHTS, load_adapter, save_adapter
from jaxrl.model.folders import MANIFEST
from jaxrl.model.stacks import SPARSE

MODEL = ModelConfig(
    family="qwen2", vocab_size=24, layers=2, width=16, query_heads=4, kv_heads=2, head_width=4, ffn_width=20,
    init_scale=0.3, max_positions=64,
)  # fmt: skip
ALL = LoraConfig(rank=3, alpha=7.0)
MOE = dataclasses.replace(
    MODEL, family="qwen3_moe", experts=4, experts_per_token=2, expert_width=12, tie_embeddings=False
)
EXPERTS = LoraConfig(rank=3, alpha=7.0, targets=("all-linear", "embed_tokens", "lm_head"))
SOME = LoraConfig(rank=4, alpha=8.0, rank_stabilized=True, targets=("v_proj", "o_proj", "mlp.down_proj"))
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (2, 9)).astype(np.int32)


def random_like(specs: Any, seed: int) -> Any:
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.4 * generator.normal(size=leaf.shape)).astype(leaf.dtype), specs)


def table(config: LoraConfig, model: ModelConfig = MODEL) -> Any:
    return lora.adapter_specs(transformer.param_specs(model), config)


def our_logits(params: Any, model: ModelConfig) -> np.ndarray:
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)

    @jax.jit
    def compute(params: Any) -> jax.Array:
        hidden = transformer.hidden_states(params, model, jnp.asarray(TOKENS), positions, jnp.ones_like(TOKENS))
        return logprob.logits(params, model, hidden)

    return np.asarray(compute(params))


def their_logits(model: Any) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def their_base(folder: pathlib.Path, params: Any, model: ModelConfig = MODEL) -> Any:
    transformers = pytest.importorskip("transformers")
    hf.save_folder(folder, model, params)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (dataclasses.replace(MODEL, sliding_window=3, sliding_layers=(0,)), ALL),
        (dataclasses.replace(MODEL, family="gemma3_text", sliding_window=3, sliding_layers=(0,)), SOME),
        (dataclasses.replace(MODEL, family="gemma3_text", tie_embeddings=False), EXPERTS),
        (MOE, EXPERTS),
        (MOE, dataclasses.replace(SOME, targets=("q_proj", "expert_down"))),
        (dataclasses.replace(MOE, dense_layers=(1,)), dataclasses.replace(ALL, targets=SPARSE[1:])),
    ],
    ids=[
        "qwen2",
        "gemma3",
        "gemma3 with embeddings",
        "experts and embeddings",
        "down of experts",
        "experts of a layer",
    ],
)
def test_peft_computes_the_same_logits_and_merges_to_the_same_model(
    model: ModelConfig, config: LoraConfig, tmp_path: pathlib.Path
) -> None:
    peft = pytest.importorskip("peft")
    params, adapters = random_like(transformer.param_specs(model), 1), random_like(table(config, model), 2)
    base = lora.Base(params, lora.scale_of(config))
    save_adapter(tmp_path / "adapter", config, table(config, model), adapters, "a/base")
    theirs = peft.PeftModel.from_pretrained(their_base(tmp_path / "base", params, model), tmp_path / "adapter").eval()
    ours = our_logits(base.adapted(adapters), model)
    assert np.abs(ours - our_logits(params, model)).max() > 0.1
    np.testing.assert_allclose(ours, their_logits(theirs), atol=1e-4, rtol=0)
    assert theirs.peft_config["default"].base_model_name_or_path == "a/base"
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    _, merged = hf.load_folder(tmp_path / "merged")
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=2e-6), base.merged(adapters), merged)


@pytest.mark.parametrize(
    "config",
    [ALL, SOME, dataclasses.replace(SOME, targets=("embed_tokens", "lm_head", "q_proj"))],
    ids=["all-linear", "some, rank-stabilised", "embeddings"],
)
def test_an_adapter_that_peft_saved_is_read(config: LoraConfig, tmp_path: pathlib.Path) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model = dataclasses.replace(MODEL, tie_embeddings=False)
    params = random_like(transformer.param_specs(model), 1)
    targets = [target.rpartition(".")[2] for target in config.targets]
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.rank_stabilized,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(their_base(tmp_path / "base", params, model), settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs.save_pretrained(tmp_path / "adapter")
    adapters = load_adapter(tmp_path / "adapter", config, table(config, model))
    ours = our_logits(lora.Base(params, lora.scale_of(config)).adapted(adapters), model)
    np.testing.assert_allclose(ours, their_logits(theirs), atol=1e-4, rtol=0)


def test_those_of_experts_that_peft_saved_on_its_own_layout_are_refused_with_the_remedy(tmp_path: pathlib.Path) -> None:
    """PEFT has one pair of twice the rank for gate and up of an expert together: no two pairs say the same."""
    peft = pytest.importorskip("peft")
    config = dataclasses.replace(ALL, targets=("expert_gate", "expert_up", "expert_down"))
    theirs = their_base(tmp_path / "base", random_like(transformer.param_specs(MOE), 1), MOE)
    modules = ["gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=modules, task_type="CAUSAL_LM")
    peft.get_peft_model(theirs, settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"has rank_pattern=.*gate_up_proj.*merge this adapter into its model with"):
        load_adapter(tmp_path / "adapter", config, table(config, MOE))


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({}, dataclasses.replace(ALL, targets=("expert_up", "expert_down")), r"expert_down and expert_up without the"),
        ({}, dataclasses.replace(ALL, targets=("expert_gate", "expert_up")), r"expert_gate and expert_up without the"),
        ({}, dataclasses.replace(ALL, rank_stabilized=True), r"LoraConfig.rank_stabilized=True for gate and up"),
        ({"dense_layers": (1,)}, ALL, r"adapters of gate, up, down in layers without experts"),
    ],
)
def test_what_peft_would_load_as_something_else_is_refused(
    changes: dict[str, Any], config: LoraConfig, message: str, tmp_path: pathlib.Path
) -> None:
    specs = table(config, dataclasses.replace(MOE, **changes))
    with pytest.raises(ConfigError, match=rf"peft does not load .*{message}.*leave out --adapter"):
        save_adapter(tmp_path / "adapter", config, specs, random_like(specs, 2))
    assert not (tmp_path / "adapter").exists()


def test_written_and_read_again_it_is_the_same_bit_for_bit(tmp_path: pathlib.Path) -> None:
    adapters = random_like(table(SOME), 2)
    for _ in range(2):  # the second replaces the first
        save_adapter(tmp_path / "adapter", SOME, table(SOME), jax.device_put(adapters))
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path / "adapter", SOME, table(SOME)), adapters)
    specs = table(EXPERTS, MOE)
    experts = random_like(specs, 3)
    save_adapter(tmp_path / "experts", EXPERTS, specs, experts)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path / "experts", EXPERTS, specs), experts)
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [MANIFEST, CONFIG, WEIGHTS]
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"] == [
        "down_proj",
        "o_proj",
        "v_proj",
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrower_types_are_read(dtype: str, tmp_path: pathlib.Path) -> None:
    adapters = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), random_like(table(SOME), 2))
    save_adapter(tmp_path / "adapter", SOME, table(SOME), adapters)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / WEIGHTS)
    narrow = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(narrow, tmp_path / "adapter" / WEIGHTS)
    found = load_adapter(tmp_path / "adapter", SOME, table(SOME))
    jax.tree.map(np.testing.assert_array_equal, found, adapters)
    assert {str(leaf.dtype) for leaf in flax.traverse_util.flatten_dict(found).values()} == {"float32"}


# A folder with something wrong in it.

FIRST = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"


def set_config(**changes: Any) -> Callable[[pathlib.Path], None]:
    def spoil(folder: pathlib.Path) -> None:
        document = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(document | changes))

    return spoil


def rewrite(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[pathlib.Path], None]:
    def spoil(folder: pathlib.Path) -> None:
        tensors = safetensors.numpy.load_file(folder / WEIGHTS)
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / WEIGHTS)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            set_config(peft_type="IA3"),
            r"has peft_type='IA3', which is not supported \(only 'LORA'\); merge this adapter",
        ),
        (set_config(use_dora=True), r"has use_dora=True"),
        (set_config(bias="all"), r"has bias='all'"),
        (set_config(modules_to_save=["lm_head"]), r"has modules_to_save=\['lm_head'\]"),
        (set_config(rank_pattern={"q_proj": 8}), r"has rank_pattern="),
        (set_config(init_lora_weights="pissa"), r"has init_lora_weights='pissa'"),
        (set_config(r=8), r"an adapter of rank 8, but LoraConfig.rank=4; set LoraConfig.rank=8"),
        (set_config(lora_alpha=3), r"an adapter of alpha 3, but LoraConfig.alpha=8.0; set LoraConfig.alpha=3"),
        (set_config(use_rslora=False), r"set LoraConfig.rank_stabilized=False"),
        (rewrite(lambda t: t.pop(FIRST)), rf"missing: {FIRST} \(4, 16\).*Set LoraConfig.targets to the target_modules"),
        (rewrite(lambda t: t.update(other=np.zeros((2, 3), np.float32))), r"not asked for: other"),
        (rewrite(lambda t: t.update({FIRST: np.zeros((4, 8), np.float32)})), r"v_proj.*is \(4, 8\), wanted \(4, 16\)"),
        (
            rewrite(lambda t: t.update({FIRST: np.zeros((4, 16), np.int8)})),
            r"types other than F32, BF16, F16: .* is I8",
        ),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), r"is damaged .*; fetch"),
        (lambda folder: (folder / WEIGHTS).unlink(), r"has no adapter_model.safetensors; only safetensors are read"),
        (lambda folder: (folder / CONFIG).unlink(), r"adapter_config.json is not there"),
    ],
)
def test_a_spoilt_folder_is_refused(
    spoil: Callable[[pathlib.Path], None], message: str, tmp_path: pathlib.Path
) -> None:
    save_adapter(tmp_path / "adapter", SOME, table(SOME), random_like(table(SOME), 2))
    spoil(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=message):
        load_adapter(tmp_path / "adapter", SOME, table(SOME))


def test_what_is_no_adapter_is_never_replaced(tmp_path: pathlib.Path) -> None:
    hf.save_folder(tmp_path / "model", MODEL, random_like(transformer.param_specs(MODEL), 1))
    with pytest.raises(ConfigError, match="exists and is no"):
        save_adapter(tmp_path / "model", SOME, table(SOME), random_like(table(SOME), 2))
