"""The whole loop on a tiny run: on-policy ratio, prefetch, skipped steps, compilations, the exported model."""

import dataclasses
import io
import json
import pathlib

import jax
import numpy as np
import pytest

from jaxrl.config import Config
from jaxrl.observe.progress import Progress
from jaxrl.observe.traces import read_episodes
from jaxrl.observe.writers import read_metrics
from jaxrl.records import ToolStatus
from jaxrl.text.tokenizer import load_tokenizer
from jaxrl.train import attention, experiment, recorder


def test_promise_1_the_first_update_is_on_policy(tiny_run: pathlib.Path) -> None:
    first = read_metrics(tiny_run, "rl")[0]
    assert first["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert first["logprob_gap_max"] < 1e-5
    assert first["clip_fraction"] == 0.0


def test_groups_played_ahead_keep_the_version_that_sampled_them(tiny_run: pathlib.Path) -> None:
    files = sorted((tiny_run / "episodes").glob("rl_*.jsonl"))
    for step, file in enumerate(files):
        versions = {t.draw: set(t.versions[t.mask == 1].tolist()) for t in read_episodes(file)}
        draws = sorted(versions)
        assert len(draws) == 3
        ahead = 1 if step else 0
        assert all(versions[draw] == {step - 1} for draw in draws[:ahead])
        assert all(versions[draw] == {step} for draw in draws[ahead:])
        assert read_metrics(tiny_run, "rl")[step]["left_out"] == 0


def test_consecutive_draws_are_new_problems_and_new_samples(tiny_run: pathlib.Path) -> None:
    trajectories = [t for file in (tiny_run / "episodes").glob("rl_*.jsonl") for t in read_episodes(file)]
    keys = {(t.draw, t.sample) for t in trajectories}
    assert len(keys) == len(trajectories) == 4 * 3 * 6
    assert {t.draw for t in trajectories} == set(range(12))


def test_tools_really_ran(tiny_run: pathlib.Path) -> None:
    calls = [c for f in (tiny_run / "episodes").glob("*.jsonl") for t in read_episodes(f) for c in t.calls]
    done = [call for call in calls if call.status is ToolStatus.OK]
    assert done and all(call.isolation.startswith("jail") for call in done)


def test_every_episode_of_an_evaluation_is_on_disk(tiny_run: pathlib.Path) -> None:
    rows = read_metrics(tiny_run, "eval")
    files = sorted((tiny_run / "episodes").glob("eval_*.jsonl"))
    assert [int(file.stem.removeprefix("eval_")) for file in files] == [row["step"] for row in rows]
    for row, file in zip(rows, files, strict=True):
        played = read_episodes(file)
        sampled, greedy = played[: 2 * 2], played[2 * 2 :]  # two problems, two samples each
        assert sum(t.correct for t in sampled) / len(sampled) == pytest.approx(row["pass@1, sampled"])
        assert sum(t.correct for t in greedy) / len(greedy) == pytest.approx(row["pass@1, greedy"])


def test_the_summary_says_what_the_run_did(tiny_run: pathlib.Path) -> None:
    summary = json.loads((tiny_run / "summary.json").read_text())
    assert summary["steps"] == 4
    assert 0 <= summary["pass_rate_before"] <= 1 and 0 <= summary["pass_rate_after"] <= 1
    assert {"tool_error_share_in_correct", "tokens_per_second"} <= summary.keys()
    assert {"cold start", "rollout", "update", "evaluate"} <= summary["seconds_by_phase"].keys()


def test_promise_9_transformers_loads_the_export_and_answers(tiny_run: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from jaxrl.model import hf, transformer
    from jaxrl.model.logprob import logits

    folder = tiny_run / "export"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    trajectory = read_episodes(sorted((tiny_run / "episodes").glob("rl_*.jsonl"))[-1])[0]
    assert tokenizer(trajectory.problem.question, add_special_tokens=False).input_ids == ours.encode(
        trajectory.problem.question
    )
    messages = [{"role": "user", "content": trajectory.problem.question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == trajectory.prompt_ids.tolist()

    config, params = hf.load_folder(folder)
    ids = np.concatenate([trajectory.prompt_ids, trajectory.ids])[None]
    positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    arrays = jax.tree.map(jax.numpy.asarray, (params, ids, positions, np.ones_like(ids)))
    hidden = transformer.hidden_states(arrays[0], config, *arrays[1:])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(np.asarray(logits(arrays[0], config, hidden)), expected, atol=1e-4)

    written = theirs.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False, eos_token_id=ours.end_id)
    assert "<tool_call>" in ours.decode(written[0, len(prompt) :].tolist())


def test_promise_11_nothing_is_compiled_once_the_steps_run(
    tiny_config: Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside it: of every kind of packed rows it is asked whether they are too many for the kernels."""
    monkeypatch.setattr(attention.Crowding, "note", lambda self, section, _: f"{type(section).__name__} is asked of")
    compiled: list[str] = []
    before_step: list[int] = []
    after_steps: list[int] = []
    begin, export = recorder.Recorder.begin_step, experiment.export

    def exported(*arguments: object, **options: object) -> None:
        after_steps.append(len(compiled))
        export(*arguments, **options)

    def counted(*arguments: object) -> None:
        begin(*arguments)
        before_step.append(len(compiled))

    monkeypatch.setattr(recorder.Recorder, "begin_step", counted)
    monkeypatch.setattr(experiment, "export", exported)
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    train = dataclasses.replace(tiny_config.train, steps=5, eval_every=0)
    shown = io.StringIO()
    with Progress("tiny", file=shown, live=False) as view:
        experiment.train(dataclasses.replace(tiny_config, train=train), tmp_path / "run", view)
    jax.monitoring.clear_event_listeners()
    assert before_step[0] > 0  # the listener heard the compilations of the start
    assert len(before_step) == 5 and compiled[before_step[0] : after_steps[0]] == []
    assert all(f"{name} is asked of" in shown.getvalue() for name in ("SftConfig", "TrainConfig"))


def test_a_step_from_which_nothing_survives_is_skipped_and_counted(tiny_config: Config, tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(
        tiny_config,
        sft=dataclasses.replace(tiny_config.sft, demonstrations=""),
        train=dataclasses.replace(tiny_config.train, steps=1, max_draws=2, prefetch_groups=0, problems=1, samples=4),
    )
    shown = io.StringIO()
    with Progress("tiny", file=shown, live=False) as view:
        experiment.train(config, tmp_path / "run", view)
    assert "step 1/1  nothing to train on (all wrong: 100%)" in shown.getvalue()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_steps"] == 1
    (row,) = read_metrics(tmp_path / "run", "rl")
    assert row["skipped_steps"] == 1
    assert "grad_norm" not in row
    assert row["select/groups_all_wrong"] == 1.0
    played = read_episodes(tmp_path / "run" / "episodes" / "rl_000001.jsonl")
    assert {t.draw for t in played} == {0, 1}  # drawn again once
