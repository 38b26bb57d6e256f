"""Models of every family made by transformers, larger than the recorded ones: logits, log-probabilities, gradients.

Their config.json is the one transformers 5 writes, and again the same in the style of transformers 4.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import ModelConfig
from jaxrl.model import hf, logprob, spec, transformer
from jaxrl.model.families import FAMILIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 384, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 7, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 512, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.06,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 3,
        "rope_parameters": {"rope_theta": 900.0, **YARN},
    },
    "qwen3": {"attention_bias": True, "rope_parameters": {"rope_theta": 900.0, "rope_type": "default"}},
    "llama": {"rope_parameters": {"rope_theta": 500.0, **LLAMA3}},
    "mistral": {"sliding_window": 30, "tie_word_embeddings": True},
    "gemma2": {"sliding_window": 20, "query_pre_attn_scalar": 40, "attn_logit_softcapping": 3.0},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "norm_topk_prob": False,
    },
    "gemma3_text": {
        "sliding_window": 20,
        "query_pre_attn_scalar": 40,
        "rope_parameters": {
            "full_attention": {"rope_theta": 900.0, **LINEAR},
            "sliding_attention": {"rope_theta": 50.0, "rope_type": "default"},
        },
    },
}
"""Keys of config.json with which as much as possible of a family is at work."""

OLD_ROPE: dict[str, dict[str, Any]] = {
    "qwen2": {"rope_theta": 900.0, "rope_scaling": YARN},
    "qwen3": {"rope_theta": 900.0, "rope_scaling": None},
    "llama": {"rope_theta": 500.0, "rope_scaling": LLAMA3},
    "gemma3_text": {"rope_theta": 900.0, "rope_scaling": LINEAR, "rope_local_base_freq": 50.0},
}
"""The rotary keys of transformers 4 for the same models."""
SOME_DENSE = {"decoder_sparse_step": 2, "mlp_only_layers": [0, 5]}
"""Of 7 layers the second and the fourth have experts."""
ROWS, TOKENS = 2, 150


def made_by_transformers(family: str, folder: pathlib.Path, more: dict[str, Any]) -> Any:
    """A random model, saved in ``folder``, in which no parameter is without effect."""
    torch.manual_seed(1)
    config = transformers.CONFIG_MAPPING[family](**SIZES, **OPTIONS[family], **more)
    config._attn_implementation = "eager"  # the others leave out the soft cap
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def in_the_old_style(folder: pathlib.Path, family: str) -> None:
    """Rewrite config.json as transformers 4 wrote it."""
    file = folder / "config.json"
    document = json.loads(file.read_text())
    theta = document.pop("rope_parameters").get("rope_theta")
    document |= {"rope_theta": theta, "torch_dtype": document.pop("dtype"), **OLD_ROPE.get(family, {})}
    file.write_text(json.dumps(document))


def reference(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Logits [B, T, V], log-probabilities [B, T-1], and the norm of every tensor's gradient for the latter's mean."""
    ids = torch.tensor(tokens, dtype=torch.long)
    logits = model(ids).logits
    scores = torch.log_softmax(logits[:, :-1].double(), dim=-1)
    logprobs = torch.gather(scores, -1, ids[:, 1:, None])[..., 0]
    logprobs.mean().backward()
    norms = {}
    for name, parameter in model.named_parameters():
        norms |= {part: float(gradient.norm()) for part, gradient in saved_as(name, parameter.grad)}
    return logits.detach().numpy(), logprobs.detach().numpy(), norms


def saved_as(name: str, tensor: Any) -> list[tuple[str, Any]]:
    """The tensors of a folder that make up a parameter of the model: experts are joined in memory only."""
    before, joined, kind = name.partition(".experts.")
    if not joined:
        return [(name, tensor)]
    parts = zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True)
    named = parts if kind == "gate_up_proj" else [(kind, tensor)]
    return [
        (f"{before}.experts.{expert}.{part}.weight", stacked[expert]) for part, stacked in named for expert in range(6)
    ]


def our_functions(config: ModelConfig, tokens: np.ndarray) -> Callable[[Any], Any]:
    """(logits, log-probabilities of tokens[:, 1:]) and the gradient of the mean of the latter."""
    positions = jnp.broadcast_to(jnp.arange(TOKENS), tokens.shape)
    rows = {"tokens": jnp.asarray(tokens), "positions": positions, "segment_ids": jnp.ones_like(positions)}

    def mean(params: Any) -> tuple[jax.Array, Any]:
        hidden = transformer.hidden_states(params, config, **rows)
        logprobs = logprob.sequence_logprobs(params, config, **rows).logprobs[:, 1:]
        return logprobs.mean(), (logprob.logits(params, config, hidden), logprobs)

    return jax.jit(jax.value_and_grad(mean, has_aux=True))


def tensor_norms(config: ModelConfig, gradient: Any) -> dict[str, float]:
    """Frobenius norm of every tensor of the folder."""
    specs, norms = flax.traverse_util.flatten_dict(transformer.param_specs(config)), {}
    for key, leaf in flax.traverse_util.flatten_dict(jax.device_get(gradient)).items():
        for place, name in specs[key].hf_names.items():
            norms[name] = float(np.linalg.norm(leaf[place]))
    return norms


@pytest.mark.slow
@pytest.mark.parametrize(("family", "more"), [*((family, {}) for family in FAMILIES), ("qwen3_moe", SOME_DENSE)])
def test_a_larger_model_of_transformers(family: str, more: dict[str, Any], tmp_path: pathlib.Path) -> None:
    theirs = made_by_transformers(family, tmp_path / "theirs", more)
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (ROWS, TOKENS)).astype(np.int32)
    logits, logprobs, norms = reference(theirs, tokens)
    config, params = hf.load_folder(tmp_path / "theirs")
    (_, found), gradient = our_functions(config, tokens)(params)
    np.testing.assert_allclose(found[0], logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(found[1], logprobs, atol=1e-4, rtol=0)
    assert tensor_norms(config, gradient) == pytest.approx(norms, rel=1e-3)
    in_the_old_style(tmp_path / "theirs", family)
    assert hf.read_config(tmp_path / "theirs", base=config) == config
    hf.save_folder(tmp_path / "back", config, params)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.sliding == "most"])
def test_an_export_that_slides_nowhere_runs_in_transformers(family: str, window: int, tmp_path: pathlib.Path) -> None:
    config = ModelConfig(
        family=family, vocab_size=64, layers=2, width=32, query_heads=4, kv_heads=2, head_width=8, ffn_width=48,
        local_rope_theta=50.0 if FAMILIES[family].local_rope_theta else 0.0, init_scale=0.2, tie_embeddings=True,
        sliding_window=window,
    )  # fmt: skip
    params = spec.initialize(transformer.param_specs(config), jax.random.key(0))
    hf.save_folder(tmp_path, config, params)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, TOKENS)).astype(np.int32)
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    (_, found), _ = our_functions(config, tokens)(params)
    np.testing.assert_allclose(found[0], logits, atol=1e-4, rtol=0)
