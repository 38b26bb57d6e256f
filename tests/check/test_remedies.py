"""Which changes are proposed, in which order, and that none is more than a cheaper one."""

import dataclasses
import functools
import io
import itertools
import threading
from typing import Any

import pytest
from rich.console import Console

from jaxrl.check import estimate, mending, remedies, report, run, targets
from jaxrl.check.programs import Resident
from jaxrl.check.remedies import Remedy, candidates, changed, says_little
from jaxrl.check.worker import Compiled
from jaxrl.config import Config, ConfigError


@pytest.fixture(scope="module")
def recipe() -> Config:
    return run.configuration("rstar2_14b", [])


def proposed(config: Config, name: str, count: int = 6) -> list[Remedy]:
    target = targets.parse(name)
    nothing = Resident(*[0] * len(dataclasses.fields(Resident)))
    base = run.Result(config, target, target.devices, target.memory(), 0, nothing, {})
    needs = functools.partial(run._needs, base=base)
    found = candidates(config, target, target.devices, target.memory(), needs)
    chosen: list[Remedy] = []
    for remedy in found:
        if not any(says_little(remedy, earlier, config, target) for earlier in chosen):
            chosen.append(remedy)
        if len(chosen) == count:
            break
    return chosen


def test_changed_values_are_those_of_the_section() -> None:
    config = changed(Config(), {"TrainConfig.rows": 3, "MeshConfig.context": 2})
    assert (config.train.rows, config.mesh.context) == (3, 2)
    assert dataclasses.replace(config, train=Config().train, mesh=Config().mesh) == Config()


def test_cheap_changes_come_before_devices(recipe: Config) -> None:
    found = proposed(recipe, "h100x8")
    assert [remedy.price for remedy in found] == sorted(remedy.price for remedy in found)
    assert found[0].target.name == "h100x8" and found[0].settings["TrainConfig.rows"] == 8
    assert any("OptimizerConfig.offload" in remedy.settings for remedy in found)
    assert any(remedy.target.name != "h100x8" for remedy in proposed(recipe, "h100x8", 12))


def test_what_says_little_beside_another(recipe: Config) -> None:
    here, more, other = map(targets.parse, ("v5e-8", "v5e-16", "v5p-8"))

    def one(target: targets.Target = here, **settings: int | str) -> Remedy:
        return Remedy({f"EngineConfig.{name}": value for name, value in settings.items()}, target, 1.0, ())

    def little(remedy: Remedy, beside: Remedy) -> bool:
        return says_little(remedy, beside, recipe, here)

    half, quarter = one(pages=8192), one(pages=4096)
    assert little(quarter, half)  # it goes further
    assert little(half, quarter)  # it changes the same
    assert little(one(pages=8192, slots=64), half) and not little(one(slots=64), half)
    assert not little(one(pages=8192, slots=64), quarter)  # it goes less far in one
    assert little(one(more, pages=8192), half) and not little(half, one(more, pages=8192))
    assert not little(one(other, pages=8192), half)  # other devices have more memory
    assert little(one(other, slots=64), one(other, pages=8192))  # one of a kind is enough


def test_no_replica_is_wider_than_a_process(recipe: Config) -> None:
    target = targets.parse("v5e-8")
    found = itertools.islice(candidates(recipe, target, 8, target.memory(), lambda config, devices: 0), 500)
    assert {remedy.settings.get("MeshConfig.rollout_tensor", 4) for remedy in found} == {4}


def test_what_the_mesh_refuses_is_no_remedy_and_what_did_not_help_hides_nothing(
    recipe: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, nothing = targets.parse("h100x8"), Resident(*[0] * len(dataclasses.fields(Resident)))
    asked: list[str] = []
    counting = threading.Lock()

    def compiled(config: Config, target: targets.Target, *rest: object, **how: object) -> run.Result:
        with counting:
            asked.append(target.name)
            place = len(asked)
        if place == 2:
            raise ConfigError("MeshConfig asks for what is not there")
        programs = {"more": Compiled(temporary=10**13 if place in (1, 3) else 0), "decode": Compiled()}
        return run.Result(config, target, target.devices, target.memory(), 0, nothing, programs)

    monkeypatch.setattr(run, "compile_for", compiled)
    monkeypatch.setattr(run, "_needs", lambda config, devices, base: 0)
    report = run.check(recipe, target, lambda line: None)
    assert len(report.mended) == mending.REMEDIES and report.tried == mending.REMEDIES + 2 == len(asked) - 1


@pytest.mark.parametrize(
    ("quickly", "truly", "helps", "again"),
    [(0.98, 1.01, False, True), (0.98, 0.99, True, True), (0.96, 9.0, True, False)],
)
def test_a_remedy_that_hardly_fits_is_compiled_as_training_does(
    recipe: Config, monkeypatch: pytest.MonkeyPatch, quickly: float, truly: float, helps: bool, again: bool
) -> None:
    """Little effort may find less memory than all effort does."""
    target, nothing = targets.parse("v5e-8"), Resident(*[0] * len(dataclasses.fields(Resident)))
    asked: list[tuple[str, ...]] = []

    def compiled(config: Config, target: targets.Target, *rest: object, **how: Any) -> run.Result:
        quick, names = how.get("quick", False), tuple(how.get("names", run.COMPILED))
        share = quickly if quick else truly if asked else 2
        asked.append(names)
        programs = {
            name: Compiled(temporary=int(target.memory() * share * (name == "more")), effort=-1.0 if quick else 0.0)
            for name in names
        }
        return run.Result(config, target, target.devices, target.memory(), 0, nothing, programs)

    monkeypatch.setattr(run, "compile_for", compiled)
    monkeypatch.setattr(run, "_needs", lambda config, devices, base: 0)
    monkeypatch.setattr(mending, "REMEDIES", 1)
    monkeypatch.setattr(mending, "TRIES", 1)
    found = run.check(recipe, target, lambda line: None)
    assert (len(found.mended), found.tried) == (int(helps), 1)
    assert asked[1:] == ([run.DECISIVE, ("more",)] if again else [run.DECISIVE])
    for _, outcome in found.mended:
        assert outcome.fullest.name == "more" and (outcome.compiled["more"].effort == 0) == again
        assert outcome.compiled["decode"].effort == -1
        console = Console(width=160, record=True, file=io.StringIO())
        report.show(found, console)
        assert ("re-checked:" in console.export_text()) == again


def test_frozen_weights_may_be_kept_in_codes(recipe: Config) -> None:
    """A replica of the engine holds 14B as bfloat16, and nothing else, on four chips of 16 GiB."""
    bases = {remedy.settings.get("LoraConfig.base") for remedy in proposed(recipe, "v5e-32", 3)}
    assert bases & {"nf4", "int8"}
    adapted = changed(recipe, {"LoraConfig.rank": 8, "LoraConfig.base": "nf4"})
    assert not any("LoraConfig.base" in remedy.settings for remedy in proposed(adapted, "v5e-32", 3))


def test_experts_may_compute_in_chunks(recipe: Config) -> None:
    sparse = {
        "family": "qwen3_moe",
        "width": 2048,
        "query_heads": 32,
        "kv_heads": 4,
        "experts": 128,
        "expert_width": 768,
    }
    settings = {f"ModelConfig.{name}": value for name, value in sparse.items()}
    config = changed(recipe, settings | {"ModelConfig.experts_per_token": 8, "MeshConfig.expert": 8})
    in_chunks = changed(config, {"ModelConfig.expert_chunk": 4096})
    assert estimate.temporary(in_chunks, 64, "gpu") < estimate.temporary(config, 64, "gpu") / 2
    assert "ModelConfig.expert_chunk" in proposed(config, "h100x64", 1)[0].settings
    assert all("ModelConfig.expert_chunk" not in remedy.settings for remedy in proposed(in_chunks, "h100x64", 3))


def test_every_one_can_run_and_is_estimated_to_fit(recipe: Config) -> None:
    for remedy in proposed(recipe, "v5e-8"):
        config, devices = changed(recipe, remedy.settings), remedy.target.devices
        estimate.tokens_per_device(config, devices)  # refuses rows that cannot be split
        total = estimate.resident(config, devices).weights + estimate.temporary(config, devices, "tpu")
        assert total < remedy.target.memory()
        assert remedy.words


def test_a_refused_mesh_is_no_remedy(recipe: Config) -> None:
    """Five KV heads: no replica on two or four devices, no tensor axis."""
    found = proposed(changed(recipe, {"ModelConfig.kv_heads": 5, "MeshConfig.rollout_tensor": 1}), "v5e-8")
    assert found and not any({"MeshConfig.rollout_tensor", "MeshConfig.tensor"} & set(one.settings) for one in found)


def test_a_replica_may_have_more_devices_than_there_are_kv_heads(recipe: Config) -> None:
    config = changed(recipe, {"ModelConfig.kv_heads": 2, "MeshConfig.rollout_tensor": 2})
    four = changed(config, {"MeshConfig.rollout_tensor": 4})
    two, shared = estimate.resident(config, 64), estimate.resident(four, 64)
    assert shared.pages == two.pages and shared.engine < 0.52 * two.engine
    steps = [step.settings for step in remedies._wider_replicas(config)]
    assert steps[0] == {"MeshConfig.rollout_tensor": 4}


@pytest.mark.parametrize("name", ["fsdp", "tensor"])
def test_estimates_refuse_what_does_not_divide(recipe: Config, name: str) -> None:
    with pytest.raises(ConfigError):
        estimate.resident(changed(recipe, {f"MeshConfig.{name}": 7}), 64)


def test_an_estimate_follows_what_was_compiled(recipe: Config) -> None:
    target = targets.parse("h200x64")
    rests = estimate.resident(recipe, 64)
    compiled = {"more": Compiled(temporary=20 * targets.GIB), "decode": Compiled(temporary=targets.GIB)}
    base = run.Result(recipe, target, 64, target.memory(), 0, rests, compiled)
    same = run._needs(recipe, 64, base=base)
    assert same == max(moment.total for moment in base.moments)
    halved = run._needs(changed(recipe, {"TrainConfig.rows": 32, "MeshConfig.context": 2}), 64, base=base)
    assert same - 12 * targets.GIB < halved < same
