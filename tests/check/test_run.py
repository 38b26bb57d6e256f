"""``jaxrl check`` for this machine: the whole way, its table and JSON, and bad input."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from rich.console import Console

from jaxrl import cli
from jaxrl.check import cost, environment, estimate, ledger, programs, remedies, report, run, targets, worker
from jaxrl.config import Config, ConfigError
from jaxrl.model import spec, transformer
from jaxrl.model.config_json import hf_config
from tests.check.conftest import SMALL

pytestmark = pytest.mark.timeout(900)

DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


@pytest.fixture(scope="module")
def config() -> Config:
    return run.configuration("smoke", SMALL)


@pytest.fixture(scope="module")
def result(config: Config) -> run.Result:
    """For eight devices of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", DEVICES["XLA_FLAGS"])
        return run.compile_for(config, targets.parse("this"), lambda line: None, names=programs.NAMES)


def test_every_program_is_compiled(result: run.Result) -> None:
    assert result.devices == 8
    assert set(programs.NAMES) - set(result.compiled) == set(programs.CRITIC)
    assert all(program.arguments > 0 for program in result.compiled.values())
    assert {one["kind"] for one in result.compiled["more"].traffic} >= {"all-gather", "all-reduce"}
    assert result.compiled["more"].flops == result.compiled["first"].flops > result.compiled["score"].flops > 0


def test_no_program_that_is_left_out_needs_more_than_one_that_is_not(result: run.Result) -> None:
    totals = {moment.name: moment.total for moment in result.moments}
    assert set(programs.NAMES) - set(run.COMPILED) == {"first"} and totals["first"] <= totals["more"]
    assert set(run.COMPILED) - set(run.DECISIVE) == {"score"} and totals["score"] <= totals["more"]
    assert sorted(name for part in run.SPLIT for name in part) == sorted(programs.NAMES)


def test_flops_are_those_of_the_layers(result: run.Result, config: Config) -> None:
    """Twice the matrices' sizes a token, four times over: forward, again, and twice backward; the head thrice."""
    model, tokens = config.model, config.train.rows * config.train.row_tokens
    heads = model.query_heads + model.kv_heads
    layer = 2 * model.width * model.head_width * heads + 3 * model.width * model.ffn_width
    head = model.width * model.vocab_size
    attention = model.query_heads * model.head_width * config.train.row_tokens  # of both products, forward
    least = 2 * tokens * (4 * model.layers * layer + 4 * head)
    most = least + 2 * tokens * model.layers * 2 * attention * 5
    assert least < result.compiled["more"].flops < most


def test_what_rests_is_what_was_estimated(result: run.Result, config: Config) -> None:
    """To the last byte, but for the optimizer's counters, and the arguments of the programs are made of it."""
    exact, guess = dataclasses.asdict(result.resident), dataclasses.asdict(estimate.resident(config, 8))
    assert 0 <= exact.pop("optimizer") - guess.pop("optimizer") < 64
    assert exact == guess
    update = result.compiled["apply"].arguments
    rests = result.resident
    assert update == pytest.approx(rests.weights + rests.optimizer + rests.gradients, abs=4096)
    assert result.compiled["copy"].arguments == pytest.approx(rests.pages, abs=4096)
    assert result.compiled["decode"].arguments == pytest.approx(rests.pages + rests.engine, rel=0.05)


def test_table_and_json_say_the_same(result: run.Result) -> None:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    report.show(run.Report(result), console)
    shown = console.export_text()
    assert "fits: 8 devices of this" in shown and "KV pages" in shown
    values = json.loads(report.as_json(run.Report(result)))
    assert all(line in shown for line in result.kernels) and values["kernels"] == list(result.kernels)
    assert any(line.startswith("attention, ") and line.endswith(": xla") for line in result.kernels)
    assert values["fits"] is True and values["devices"] == 8
    assert [moment["name"] for moment in values["moments"]] == list(result.compiled)
    for moment in values["moments"]:
        assert moment["total"] == sum(moment[part] for part in ledger.PARTS)


def test_a_result_that_does_not_fit_names_the_part(result: run.Result) -> None:
    small = dataclasses.replace(result, memory=result.fullest.total - 1)
    assert not small.fits
    assert "does not fit: 8 devices of this" in report.verdict(small)


def test_nothing_is_compiled_where_what_rests_is_too_much(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", DEVICES["XLA_FLAGS"])
    huge = dataclasses.replace(config, engine=dataclasses.replace(config.engine, pages=1 << 28))
    said: list[str] = []
    found = run.check(huge, targets.parse("this"), said.append, mend=False).result
    assert not found.fits and not found.compiled["more"].temporary
    assert found.fullest.parts["pages"] > found.memory
    assert any("nothing is compiled" in line for line in said)


def test_the_seconds_of_a_step_come_from_the_slowest_limit(result: run.Result) -> None:
    """On the numbers of a data sheet, whatever was compiled for."""
    on_pod = dataclasses.replace(result, target=targets.parse("v5e-8"))
    chip = targets.CHIPS["v5e"]
    for phase in cost.phases(on_pod):
        limits = phase.flops / chip.flops, phase.read / chip.memory_rate, phase.sent / chip.link_rate
        assert phase.seconds >= max(limits) > 0
    assert cost.phases(result) == []
    apart = dataclasses.replace(result.config.mesh, rollout_devices=4)
    halves = dataclasses.replace(on_pod, config=dataclasses.replace(result.config, mesh=apart))
    for half, whole in zip(cost.phases(halves), cost.phases(on_pod), strict=True):
        assert half.flops == pytest.approx(2 * whole.flops)


def test_every_pass_over_a_step_is_counted(result: run.Result) -> None:
    once = dataclasses.replace(result, target=targets.parse("v5e-8"))
    train = dataclasses.replace(result.config.train, passes=3)
    thrice = dataclasses.replace(once, config=dataclasses.replace(result.config, train=train))
    (update, decoding), (more_updates, same) = cost.phases(once), cost.phases(thrice)
    assert cost.micro_batches(thrice) == 3 * cost.micro_batches(once)
    for field in ("flops", "read", "sent"):
        assert getattr(more_updates, field) == pytest.approx(3 * getattr(update, field))
    assert same == decoding


def test_a_recipe_may_leave_open_what_must_be_set() -> None:
    config = run.configuration("rstar2_14b", ["TrainConfig.rows=128"])
    assert (config.model.path, config.model.width, config.train.rows) == ("", 5120, 128)
    made = run.configuration("quickstart", [])
    assert made.model.vocab_size == made.tokenizer.vocab_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smoke", "--target", "v5p64"], "no such target; did you mean v5p-64?"),
        (["smoke"], "name a recipe and a --target"),
        (["--target", "this"], "name a recipe and a --target"),
        (["smok", "--target", "this"], "no recipe called 'smok'; did you mean smoke?"),
        (["smoke", "--target", "this", "--set", "TrainConfig.row=3"], "unknown key TrainConfig.row"),
        (["smoke", "--target", "this", "--set", "MeshConfig.fsdp=7"], "MeshConfig asks for"),
    ],
)
def test_bad_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert cli.main(["check", *arguments]) == cli.BAD_USAGE
    assert message in capsys.readouterr().err


def test_the_compilers_are_those_that_jax_asks_for() -> None:
    (tpu,), gpu = environment.requirements("tpu"), environment.requirements("gpu")
    assert tpu.startswith("libtpu==0.0.")
    assert gpu[0].startswith("jax-cuda13-plugin<=") and gpu[1:] == ["nvidia-cuda-nvcc"]


def test_a_failed_installation_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", f"file://{tmp_path}/no-index")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(environment.CompilerError, match="cannot install libtpu.*is there a network"):
        environment.install("tpu", lambda line: None)
    assert not environment.installed("tpu")
    assert list((tmp_path / "jaxrl" / "check").iterdir()) == []


def test_a_kept_answer_that_is_cut_off_is_as_if_not_there(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "results" / "key.json"
    worker._keep(path, {"temporary": 3})
    assert worker._cached(path) == {"temporary": 3} and list(path.parent.iterdir()) == [path]
    for broken in ('{"temporary": 3, "rea', "[]", '{"temporary": 3}', '{"reading": 0}'):
        path.write_text(broken)
        assert worker._cached(path) is None


def test_a_critic_and_a_teacher_are_compiled_and_their_bytes_counted(config: Config, tmp_path: pathlib.Path) -> None:
    """On one device: what rests is what was estimated, and what the programs are given is made of it."""
    teacher = dataclasses.replace(config.model, layers=3)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(teacher)))
    whole = remedies.changed(
        config,
        {"MeshConfig.tensor": 1, "CriticConfig.enabled": True, "DistillConfig.teacher": str(tmp_path)},
    )
    found = programs.shapes(whole, jax.devices()[:1])
    rests, guess = found.resident(), estimate.resident(whole, 1)
    assert 0 < rests.critic_optimizer - guess.critic_optimizer < 64 and rests.optimizer - guess.optimizer < 64
    assert dataclasses.replace(rests, optimizer=0, critic_optimizer=0) == dataclasses.replace(
        guess, optimizer=0, critic_optimizer=0
    )
    assert rests.critic == rests.weights + 4 * config.model.width  # the head
    assert rests.teacher == 2 * spec.count(transformer.param_specs(teacher))  # in bfloat16
    traced = found.traced(programs.NAMES)
    assert set(programs.NAMES) - set(traced) == {programs.HAND_OVER}  # one device: nothing is laid out anew
    batch = programs.batch_bytes(whole, found.mesh)
    given = {name: sum(one.size * one.dtype.itemsize for one in traced[name].jaxpr.in_avals) for name in traced}
    assert given["more"] == pytest.approx(2 * rests.weights + rests.teacher + batch, rel=0.02)
    assert given["critic apply"] == pytest.approx(2 * rests.critic + rests.critic_optimizer, abs=4096)
    assert given["values"] == rests.critic + batch
    assert given["critic more"] == pytest.approx(2 * rests.critic + batch, abs=256)  # and sums of metrics
    compiled = dict.fromkeys(traced, worker.Compiled())
    moments = {moment.name: moment.parts for moment in ledger.moments(rests, batch, compiled)}
    assert all(parts["teacher"] == rests.teacher for parts in moments.values())
    assert moments["more"]["critic"] == rests.critic + rests.critic_optimizer
    assert (moments["critic more"]["gradients"], moments["values"]["gradients"]) == (rests.critic, 0)
    offloaded = dataclasses.replace(rests, critic_optimizer=0, critic_offloaded=rests.critic_optimizer)
    away = {moment.name: moment.parts["critic"] for moment in ledger.moments(offloaded, batch, compiled)}
    assert away["critic apply"] == moments["critic apply"]["critic"] and away["more"] == rests.critic


def test_recorded_experts_are_part_of_a_micro_batch(config: Config) -> None:
    sparse = {"family": "qwen3_moe", "experts": 8, "experts_per_token": 3, "expert_width": 64}
    model = {f"ModelConfig.{name}": value for name, value in sparse.items()}
    plain = remedies.changed(config, model | {"MeshConfig.tensor": 1})
    recording = remedies.changed(plain, {"EngineConfig.record_experts": True})
    mesh = programs.shapes(plain, jax.devices()[:1]).mesh
    more = programs.batch_bytes(recording, mesh) - programs.batch_bytes(plain, mesh)
    assert more == config.train.rows * config.train.row_tokens * config.model.layers * 3


def test_narrow_pages_are_smaller_by_what_their_numbers_and_scales_are(config: Config) -> None:
    narrow = remedies.changed(config, {"MeshConfig.tensor": 1, "EngineConfig.kv_dtype": "int8"})
    plain = estimate.resident(remedies.changed(narrow, {"EngineConfig.kv_dtype": "auto"}), 1).pages
    rests = programs.shapes(narrow, jax.devices()[:1]).resident().pages
    assert rests == estimate.resident(narrow, 1).pages
    width = config.model.head_width
    assert rests * 2 * width == plain * (width + 4)


def test_steps_played_ahead_find_gradients(config: Config) -> None:
    stale = dataclasses.replace(config, train=dataclasses.replace(config.train, max_staleness=1, prefetch_groups=0))
    same = dataclasses.replace(config, train=dataclasses.replace(config.train, max_staleness=0, prefetch_groups=0))
    rests = estimate.resident(config, 8)
    (ahead, *_), (waiting, *_) = (run._moments(one, rests, 0, {"decode": worker.Compiled()}) for one in (stale, same))
    assert ahead.parts["gradients"] == rests.gradients > 0 == waiting.parts["gradients"]


def test_a_process_that_dies_before_it_reads_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(environment.CompilerError, match="ended with code 1"):
        list(environment.ask("this", {"long": "x" * (1 << 20)}))


def test_a_process_that_dies_is_reported_with_its_last_words() -> None:
    with pytest.raises(environment.CompilerError, match="ended with code 1"):
        list(environment.ask("this", {"target": {"name": "this"}}))


def test_a_configuration_that_the_target_refuses_is_said_so(config: Config) -> None:
    wrong = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=5))
    with pytest.raises(ConfigError, match="MeshConfig asks for"):
        run.compile_for(wrong, targets.parse("this"), lambda line: None)


def test_check_returns_one_when_it_does_not_fit() -> None:
    command = [sys.executable, "-m", "jaxrl", "check", "smoke", "--target", "this", "--json"]
    command += ["--set", f"EngineConfig.pages={1 << 36}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout or "{}").get("fits") is False, done.stderr


def test_blocks_of_codes_that_the_mesh_would_cut_are_refused_as_by_training(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", DEVICES["XLA_FLAGS"])
    lora = dataclasses.replace(config.lora, rank=4, base="nf4")
    wrong = dataclasses.replace(config, lora=lora, mesh=dataclasses.replace(config.mesh, fsdp=8, tensor=1))
    with pytest.raises(ConfigError, match=r"LoraConfig.base='nf4'.*'embed' of length 256 in 4 blocks of 64 numbers"):
        run.compile_for(wrong, targets.parse("this"), lambda line: None)
