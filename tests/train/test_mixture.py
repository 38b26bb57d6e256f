"""Demonstrations and observations learned beside reinforcement, and what the cold start learns from."""

import dataclasses
import json
import pathlib
import subprocess
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest

from jaxrl import config as configuration
from jaxrl.config import AlgorithmConfig, Config, ConfigError, MixConfig, ModelConfig
from jaxrl.data import packing
from jaxrl.model import spec, transformer
from jaxrl.observe.traces import read_episodes
from jaxrl.observe.writers import read_metrics
from jaxrl.records import Batch, Problem, Trajectory, Turn
from jaxrl.rl.selection import Selection
from jaxrl.rl.supervised import demonstration_weight, nll
from jaxrl.statuses import StopReason
from jaxrl.train import sft
from jaxrl.train.mixture import Mixture
from jaxrl.train.run import RunFolder
from jaxrl.train.session import Session, open_session
from jaxrl.train.update import policy_gradient_loss


def played(problem: Problem, draw: int = 0) -> Trajectory:
    return Trajectory(
        problem=problem,
        draw=draw,
        sample=0,
        prompt_ids=np.array([1, 2], np.int32),
        ids=np.array([3, 4, 5, 6, 7], np.int32),
        mask=np.array([1, 0, 0, 1, 1], np.int8),
        logprobs=np.full(5, -1, np.float32),
        versions=np.zeros(5, np.int32),
        turns=(Turn(0, 1, "policy"), Turn(1, 3, "tool"), Turn(3, 5, "policy")),
        stop_reason=StopReason.ANSWERED,
    )


def packed(trajectories: Sequence[Trajectory], observation_weight: float = 0.0) -> list[Batch]:
    weights = [one.mask / 6 for one in trajectories]
    advantages = [1.0] * len(trajectories)
    return packing.pack_trajectories(
        trajectories, advantages, weights, rows=4, row_tokens=160, observation_weight=observation_weight
    )


@pytest.fixture(scope="module")
def session(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return open_session(tiny_config, RunFolder(tmp_path_factory.mktemp("mixture")))


def mixture(session: Session, **settings: object) -> Mixture:
    config = dataclasses.replace(session.config, mix=MixConfig(**settings))
    return Mixture(dataclasses.replace(session, config=config))


def test_demonstrations_of_the_same_problems_are_added_and_both_losses_weighted(session: Session) -> None:
    problems = [worked.problem for worked in session.demonstrations[:2]]
    kept = [Selection((played(problem, draw),), "", {}) for draw, problem in enumerate(problems)]
    before = packed([group.kept[0] for group in kept])
    step = 100
    weight = demonstration_weight(MixConfig(), step)
    (after,) = mixture(session, demonstrations="batch").mixed([before], kept, step)
    assert len(after) == len(before) + 1
    for was, now in zip(before, after, strict=False):
        np.testing.assert_allclose(now.rl_weights, was.rl_weights * (1 - weight), rtol=1e-6)
        np.testing.assert_allclose(now.kl_weights, was.kl_weights * (1 - weight), rtol=1e-6)
        np.testing.assert_array_equal(now.mask, was.mask)
    added = after[-1]
    assert not added.rl_weights.any() and not added.mask.any()
    assert added.ce_weights.sum() == pytest.approx(weight, rel=1e-5)
    wanted = [sft.sequence(session, worked)[0].tolist() for worked in session.demonstrations[:2]]
    rows = [added.tokens[place][added.segment_ids[place] == number] for place in range(4) for number in (1, 2)]
    assert sorted(row.tolist() for row in rows if len(row)) == sorted(wanted)


def test_each_update_gets_demonstrations_of_its_own_problems(session: Session) -> None:
    problems = [worked.problem for worked in session.demonstrations[:2]]
    kept = [Selection((played(problem, draw),), "", {}) for draw, problem in enumerate(problems)]
    updates = [packed([group.kept[0]]) for group in kept]
    mixed = mixture(session, demonstrations="batch").mixed(updates, kept, 0)
    for worked, batches in zip(session.demonstrations, mixed, strict=False):
        ids, _ = sft.sequence(session, worked)
        assert batches[-1].tokens[0][: len(ids)].tolist() == ids.tolist() and (
            batches[-1].segment_ids > 0
        ).sum() == len(ids)


def test_without_a_demonstration_of_the_problem_nothing_changes(session: Session) -> None:
    kept = [Selection((played(Problem("unknown", "?", "1")),), "", {})]
    before = packed([kept[0].kept[0]])
    assert mixture(session, demonstrations="batch").mixed([before], kept, 0) == [before]
    (after,) = mixture(session, demonstrations="any").mixed([before], kept, 0)
    assert len(after) == 2 and after[1].ce_weights.sum() == pytest.approx(0.9, rel=1e-5)
    assert mixture(session, demonstrations="any").mixed([], [], 0) == []


def test_observations_weigh_outside_the_denominator_of_the_policy_loss() -> None:
    problem = Problem("p", "?", "1")
    plain, echoed = packed([played(problem), played(problem, 1)]), packed([played(problem), played(problem, 1)], 0.1)
    for was, now in zip(plain, echoed, strict=True):
        np.testing.assert_array_equal(was.rl_weights, now.rl_weights)
        assert not was.ce_weights.any()
        assert not now.ce_weights[now.mask > 0].any()
        assert now.ce_weights.sum() == pytest.approx(0.1)
        np.testing.assert_array_equal(np.unique(now.tokens[now.ce_weights > 0]), [4, 5])


def test_tokens_with_a_cross_entropy_weight_add_exactly_their_nll() -> None:
    """Also where the policy did not sample them; what has no weight adds no gradient, whatever stands there."""
    model = ModelConfig(vocab_size=16, layers=1, width=16, query_heads=2, kv_heads=1, head_width=8, ffn_width=32)
    params = spec.initialize(transformer.param_specs(model), jax.random.key(0))
    plain, echoed = packed([played(Problem("p", "?", "1"))])[0], packed([played(Problem("p", "?", "1"))], 0.1)[0]
    both = policy_gradient_loss(model, AlgorithmConfig(), 1.0, nll)
    alone = policy_gradient_loss(model, AlgorithmConfig(), 1.0)
    total, metrics = both(params, echoed, None)
    assert metrics["nll"][1] == 2
    assert float(total - alone(params, plain, None)[0]) == pytest.approx(0.1 * float(metrics["nll"][0]) / 2, rel=1e-4)
    with_nothing, without = (jax.grad(loss, has_aux=True)(params, plain, None)[0] for loss in (both, alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), with_nothing, without)


def test_mixing_needs_demonstrations_and_observations_plain_cross_entropy() -> None:
    with pytest.raises(ConfigError, match="SftConfig.demonstrations is empty; name some"):
        configuration.load("", ["MixConfig.demonstrations=any", "SftConfig.demonstrations=''"])
    with pytest.raises(ConfigError, match="MixConfig.loss='dft' would hold for observations too"):
        configuration.load("", ["MixConfig.observation_weight=0.1", "MixConfig.loss=dft"])


@pytest.mark.slow
def test_a_run_learns_from_a_file_of_messages_and_then_from_its_own_episodes(
    tmp_path: pathlib.Path, run_tiny: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """`jaxrl train` with CHORD and ECHO after a cold start on messages; `jaxrl sft` on what that run solved."""
    rows = []
    for a, b in ((a, b) for a in range(2, 6) for b in range(2, 6)):
        call = {"name": "python", "arguments": {"code": f"{a}+{b}"}}
        turns = [
            {"role": "user", "content": f"{a} plus {b}?"},
            {"role": "assistant", "content": "</reason>", "tool_calls": [call]},
            {"role": "tool", "content": f"{a + b}"},
            {"role": "assistant", "content": f"</reason>\n<answer>\\boxed{{{a + b}}}</answer>"},
        ]
        rows.append({"id": f"train/{len(rows) + 1}", "messages": turns})
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = [
        f"SftConfig.demonstrations='{file}'",
        "MixConfig.demonstrations=batch",
        "MixConfig.observation_weight=0.1",
    ]
    folder = tmp_path / "run"
    done = run_tiny(folder, more=[part for one in (*settings, "TrainConfig.steps=2") for part in ("--set", one)])
    assert done.returncode == 0, done.stdout + done.stderr
    cold = read_metrics(folder, "sft")
    assert cold[-1]["nll"] < 0.5 * cold[0]["nll"]
    assert all(row["nll"] > 0 for row in read_metrics(folder, "rl"))
    solved = [e for f in (folder / "episodes").glob("rl_*.jsonl") for e in read_episodes(f) if e.correct]
    assert solved
    again = [f"SftConfig.demonstrations='{folder}'", f"TokenizerConfig.path='{folder / 'tokenizer'}'"]
    again += ["SftConfig.steps=2", "SftConfig.loss=dft", "TrainConfig.steps=0"]
    done = run_tiny(tmp_path / "again", more=[part for one in again for part in ("--set", one)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read_metrics(tmp_path / "again", "sft")) == 2
