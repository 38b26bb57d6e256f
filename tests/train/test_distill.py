"""A student and its teacher on packed rows, in both stages, and a run that ends near its teacher."""

import dataclasses
import json
import pathlib
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import config as configuration
from jaxrl import mesh as meshes
from jaxrl.config import ConfigError, DistillConfig, MeshConfig, ModelConfig
from jaxrl.data import packing
from jaxrl.model import logprob, spec, transformer
from jaxrl.model.config_json import hf_config
from jaxrl.observe.writers import read_metrics
from jaxrl.records import Batch
from jaxrl.rl.distillation import Predictions, generalised_jsd
from jaxrl.train.distill import distillation_loss, teacher_model
from jaxrl.train.state import new_state
from jaxrl.train.update import Guides, Updater, cross_entropy_loss

STUDENT = ModelConfig(
    vocab_size=24, layers=1, width=16, query_heads=2, kv_heads=1, head_width=8, ffn_width=32, init_scale=0.3
)
TEACHER = ModelConfig(
    vocab_size=24, layers=2, width=24, query_heads=2, kv_heads=2, head_width=8, ffn_width=32, init_scale=0.3
)


def parameters(model: ModelConfig, seed: int) -> Any:
    return spec.initialize(transformer.param_specs(model), jax.random.key(seed))


@pytest.fixture(scope="module")
def batch() -> Batch:
    draw = np.random.default_rng(0)
    texts = [(draw.integers(0, 24, n).astype(np.int32), np.arange(n) > 1) for n in (7, 5, 9)]
    (made,) = packing.pack_sequences(texts, rows=2, row_tokens=16)
    return made.replace(rl_weights=made.ce_weights)


def by_hand(batch: Batch, student: Any, teacher: Any, **settings: float) -> float:
    """Text by text, with whole logits."""
    total, count = 0.0, 0
    for row in range(len(batch.tokens)):
        for segment in range(1, int(batch.segment_ids[row].max()) + 1):
            here = batch.segment_ids[row] == segment
            ids = jnp.asarray(batch.tokens[row][here])[None]
            where = (ids, jnp.arange(ids.shape[1])[None], jnp.ones(ids.shape, jnp.int32))
            logits = [
                logprob.logits(params, model, transformer.hidden_states(params, model, *where))[0, :-1]
                for params, model in ((student, STUDENT), (teacher, TEACHER))
            ]
            mask = batch.mask[row][here][1:]
            total += float((generalised_jsd(Predictions(*logits), **settings) * mask).sum())
            count += int(mask.sum())
    return total / count


@pytest.mark.parametrize("stage", ["cold_start", "reinforcement"])
def test_packed_and_chunked_is_the_divergence_of_whole_logits(batch: Batch, stage: Any) -> None:
    student, teacher = parameters(STUDENT, 0), parameters(TEACHER, 1)
    config = DistillConfig(loss_settings={"beta": 0.3, "temperature": 2.0})
    models = (STUDENT, TEACHER)
    loss = distillation_loss(cross_entropy_loss(STUDENT), models, config, stage)
    value, metrics = loss(student, batch, Guides(None, teacher))
    wanted = by_hand(batch, student, teacher, beta=0.3, temperature=2.0)
    assert float(value) == pytest.approx(wanted, rel=1e-5)
    assert float(metrics["distillation"][0] / metrics["distillation"][1]) == pytest.approx(wanted, rel=1e-5)


def test_the_exact_term_of_the_single_step_is_the_divergence_of_whole_logits(batch: Batch) -> None:
    """Nothing is credited with what comes after it at discount 0, at the sampler's temperature."""
    student, teacher = parameters(STUDENT, 0), parameters(TEACHER, 1)
    config = DistillConfig(loss="minillm_single_step", loss_settings={"discount": 0.0})
    models = (STUDENT, TEACHER)
    loss = distillation_loss(cross_entropy_loss(STUDENT), models, config, "reinforcement", 2.0)
    value = loss(student, batch, Guides(None, teacher))[0]
    assert float(value) == pytest.approx(by_hand(batch, student, teacher, beta=1.0, temperature=2.0), rel=1e-5)


def test_a_teacher_is_computed_as_its_student_is(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TEACHER)), encoding="utf-8")
    how = {"attention": "xla", "context_attention": "ring", "compute_dtype": "bfloat16", "logprob_chunk": 32}
    student = dataclasses.replace(STUDENT, path="policy", experts=4, dense_layers=(0,), sliding_window=8, **how)
    model = teacher_model(DistillConfig(teacher=str(tmp_path)), student, "reinforcement")
    assert model == dataclasses.replace(TEACHER, param_dtype="bfloat16", init_scale=model.init_scale, **how)


@pytest.mark.parametrize("name", ["generalised_jsd", "k2"])
def test_a_student_computes_with_the_experts_that_were_recorded(batch: Batch, name: str) -> None:
    model = dataclasses.replace(STUDENT, family="qwen3_moe", experts=4, expert_width=8)
    student, teacher = parameters(model, 0), parameters(TEACHER, 1)
    loss = distillation_loss(cross_entropy_loss(model), (model, TEACHER), DistillConfig(loss=name), "reinforcement")

    def value(experts: list[int] | None) -> float:
        shape = (*batch.tokens.shape, model.layers, model.experts_per_token)
        given = None if experts is None else np.broadcast_to(np.array(experts, np.int8), shape)
        return float(loss(student, batch.replace(experts=given), Guides(None, teacher))[0])

    assert len({value(None), value([0, 1]), value([2, 3])}) == 3


def test_the_stages_own_loss_is_added_by_its_weight(batch: Batch) -> None:
    student, guides = parameters(STUDENT, 0), Guides(None, parameters(TEACHER, 1))
    own, models = cross_entropy_loss(STUDENT), (STUDENT, TEACHER)
    alone, both = (
        distillation_loss(own, models, DistillConfig(task_weight=weight), "cold_start")(student, batch, guides)[0]
        for weight in (0.0, 0.5)
    )
    assert float(both - alone) == pytest.approx(0.5 * float(own(student, batch, None)[0]), rel=1e-4)


@pytest.mark.parametrize("name", ["generalised_jsd", "k2", "on_policy"])
def test_a_student_comes_to_think_as_its_teacher(batch: Batch, name: str) -> None:
    """Of the tokens in the batch, whoever wrote them; the ratio to the sampler is left out by following the student."""
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    student, teacher = parameters(STUDENT, 0), parameters(TEACHER, 1)
    config = DistillConfig(loss=name)
    loss = distillation_loss(cross_entropy_loss(STUDENT), (STUDENT, TEACHER), config, "reinforcement")
    updater = Updater(loss, optax.adam(1e-2), mesh, teacher=teacher)
    state = new_state(student, optax.adam(1e-2), mesh)

    def gap(params: Any) -> float:
        rows = batch.tokens, batch.positions, batch.segment_ids
        own = logprob.sequence_logprobs(params, STUDENT, *rows).logprobs
        theirs = logprob.sequence_logprobs(teacher, TEACHER, *rows).logprobs
        return float((jnp.abs(own - theirs) * batch.mask).sum() / batch.mask.sum())

    before = gap(student)
    for _ in range(60):
        rows = batch.tokens, batch.positions, batch.segment_ids
        params = jax.tree.map(jnp.asarray, jax.device_get(state.params))
        own = np.asarray(logprob.sequence_logprobs(params, STUDENT, *rows).logprobs)
        state, _ = updater.step(state, [batch.replace(behaviour_logprobs=own, proximal_logprobs=own)])
    assert gap(jax.tree.map(jnp.asarray, jax.device_get(state.params))) < 0.5 * before


def test_losses_of_sampled_tokens_are_refused_on_demonstrations() -> None:
    with pytest.raises(ConfigError, match="DistillConfig.loss='on_policy' is of tokens that the policy sampled"):
        configuration.load("", ["DistillConfig.loss=on_policy", "DistillConfig.stages=both"])


def test_settings_of_a_policy_loss_that_is_not_taken_are_refused() -> None:
    """Their metrics would be missing once a coefficient is adapted to them."""
    settings = [
        "AlgorithmConfig.entropy_target=0.5",
        "AlgorithmConfig.kl_coefficient=0.1",
        "MixConfig.observation_weight=0.1",
    ]
    for taught in (["DistillConfig.teacher=t"], ["DistillConfig.teacher=t", "DistillConfig.stages=both"]):
        configuration.load("", taught)
        for setting in settings:
            with pytest.raises(ConfigError, match=f"{setting} would do nothing: with DistillConfig.task_weight=0"):
                configuration.load("", [*taught, setting])
        configuration.load("", [*taught, *settings, "DistillConfig.task_weight=0.5"])
    configuration.load("", ["DistillConfig.teacher=t", "DistillConfig.stages=cold_start", *settings])


@pytest.mark.slow
def test_a_run_distils_on_demonstrations_and_on_its_own_samples(
    tiny_run: pathlib.Path, tmp_path: pathlib.Path, run_tiny: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    settings = (
        f"DistillConfig.teacher='{tiny_run / 'export'}'",
        f"TokenizerConfig.path='{tiny_run / 'tokenizer'}'",
        "DistillConfig.stages=both",
        "SftConfig.steps=30",
        "TrainConfig.steps=2",
        "AlgorithmConfig.reject_equal=False",
        "AlgorithmConfig.kl_coefficient=0.0",
        "AlgorithmConfig.keep=0",
    )
    folder = tmp_path / "run"
    done = run_tiny(folder, more=tuple(part for one in settings for part in ("--set", one)))
    assert done.returncode == 0, done.stdout + done.stderr
    cold, own = read_metrics(folder, "sft"), read_metrics(folder, "rl")
    assert cold[-1]["distillation"] < 0.5 * cold[0]["distillation"]
    assert len(own) == 2 and all(row["distillation"] >= 0 for row in own)
