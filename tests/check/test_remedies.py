"""Which changes are proposed, in which order, and that none is more than a cheaper one."""

import dataclasses
import functools

import pytest

from jaxrl.check import estimate, run, targets
from jaxrl.check.programs import Resident
from jaxrl.check.remedies import Remedy, candidates, changed
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
    return [remedy for remedy, _ in zip(found, range(count), strict=False)]


def test_changed_values_are_those_of_the_section() -> None:
    config = changed(Config(), {"TrainConfig.rows": 3, "MeshConfig.context": 2})
    assert (config.train.rows, config.mesh.context) == (3, 2)
    assert dataclasses.replace(config, train=Config().train, mesh=Config().mesh) == Config()


def test_cheap_changes_come_before_devices(recipe: Config) -> None:
    found = proposed(recipe, "h100x8")
    assert [remedy.price for remedy in found] == sorted(remedy.price for remedy in found)
    assert found[0].target.name == "h100x8" and found[0].settings["TrainConfig.rows"] == 8
    assert any("OptimizerConfig.offload" in remedy.settings for remedy in found)
    assert found[-1].target.devices > 8


def test_none_is_a_cheaper_one_and_more(recipe: Config) -> None:
    kinds = [
        frozenset(remedy.settings) | ({"target"} if remedy.target.name != "v5e-8" else set())
        for remedy in proposed(recipe, "v5e-8")
    ]
    assert len(kinds) >= 3
    for index, later in enumerate(kinds):
        assert not any(later >= earlier for earlier in kinds[:index])


def test_every_one_can_run_and_is_estimated_to_fit(recipe: Config) -> None:
    for remedy in proposed(recipe, "v5e-8"):
        config, devices = changed(recipe, remedy.settings), remedy.target.devices
        estimate.tokens_per_device(config, devices)  # refuses rows that cannot be split
        total = estimate.resident(config, devices).weights + estimate.temporary(config, devices)
        assert total < remedy.target.memory()
        assert remedy.words


def test_a_refused_mesh_is_no_remedy(recipe: Config) -> None:
    """Two KV heads: no replica on four devices, no tensor axis of four."""
    config = changed(recipe, {"ModelConfig.kv_heads": 2, "MeshConfig.rollout_tensor": 2})
    for remedy in proposed(config, "v5e-8"):
        assert remedy.settings.get("MeshConfig.rollout_tensor", 2) <= 2
        assert remedy.settings.get("MeshConfig.tensor", 1) <= 2


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
