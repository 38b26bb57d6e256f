"""Checkpoints: what is kept, what is refused, another mesh, a full disk."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import CheckpointConfig
from jaxrl.train import outlines
from jaxrl.train.checkpoint import CheckpointError, Checkpoints
from jaxrl.train.played import PlayedHandler, RestorePlayed, SavePlayed
from tests.train import updating
from tests.train.scoring import with_experts

HERE = pathlib.Path(__file__).parent


def state(step: int, width: int = 3) -> dict[str, jax.Array]:
    return {"weights": jnp.full((width, 2), step, jnp.float32)}


def target(width: int = 3) -> dict[str, jax.ShapeDtypeStruct]:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0, width)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=2))
    for step in range(6):
        checkpoints.save(step, state(step), None, {"step": step}, {1: 0.5, 3: 0.25}.get(step))
    checkpoints.close()
    return folder


def test_the_newest_and_the_best_are_kept(folder: pathlib.Path) -> None:
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=2))
    assert sorted(int(path.name) for path in folder.iterdir()) == [1, 4, 5]
    assert (checkpoints.find("latest"), checkpoints.find("best"), checkpoints.find("4")) == (5, 1, 4)
    restored, reference = checkpoints.restore(1, target(), None)
    np.testing.assert_array_equal(restored["weights"], state(1)["weights"])
    assert reference is None
    assert checkpoints.host(4) == {"step": 4}


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(folder: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint '2' in .*; there are: 1, 4, 5"):
        Checkpoints(folder, CheckpointConfig()).find("2")


def test_a_checkpoint_of_another_model_is_refused(folder: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"is of another model: weights should have shape \(4, 2\) but holds"):
        Checkpoints(folder, CheckpointConfig()).restore(5, target(width=4), None)


def test_going_back_removes_what_is_newer(tmp_path: pathlib.Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=3))
    for step in range(3):
        checkpoints.save(step, state(step), None, {}, None)
    checkpoints.wait()
    checkpoints.rewind(1)
    assert checkpoints.latest() == 1
    checkpoints.save(2, state(7), None, {}, None)
    checkpoints.wait()
    np.testing.assert_array_equal(checkpoints.restore(2, target(), None)[0]["weights"], state(7)["weights"])


def test_every_process_writes_what_it_played_and_any_number_of_them_reads_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = [with_experts(updating.group(draw)) for draw in (5, 2, 9)]
    handler, seen = PlayedHandler(), []
    for process, own in enumerate((played[:2], [], played[2:])):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        handler.save(tmp_path, SavePlayed(own))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.jsonl", "1.jsonl", "2.jsonl"]
    read = handler.restore(tmp_path, RestorePlayed(lambda group: seen.append(group.draw) or group))
    assert [group.draw for group in read] == sorted(seen) == [2, 5, 9]
    for have, wanted in zip(read, (played[1], played[0], played[2]), strict=True):
        assert have.problem == wanted.problem
        for one, other in zip(have.trajectories, wanted.trajectories, strict=True):
            for field in dataclasses.fields(other):
                np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


def test_what_was_played_ahead_is_part_of_a_checkpoint(tmp_path: pathlib.Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=1))
    for step, groups in enumerate(([updating.group(3)], [updating.group(4)], [])):
        checkpoints.save(step, state(step), None, {}, None, played=groups)
        checkpoints.wait()
        assert [group.draw for group in checkpoints.played(step, outlines.outline)] == [one.draw for one in groups]
    assert len([*tmp_path.rglob("*.jsonl")]) == 1, "and leaves with it"


def test_a_full_disk_leaves_the_older_checkpoints_intact(tmp_path: pathlib.Path) -> None:
    """On a real file system of 700 KiB, mounted in a namespace of its own."""
    mount = f"mount -t tmpfs -o size=700k none {tmp_path}"
    shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*shell, mount], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let an ordinary user mount a small file system")
    command = f"{mount} && exec {sys.executable} {HERE / 'full_disk.py'} {tmp_path}/checkpoints"
    done = subprocess.run([*shell, command], capture_output=True, text=True, check=False)
    assert "No space left on device" in done.stdout and "are intact" in done.stdout, done.stdout + done.stderr
    assert "restored: True" in done.stdout


def test_promise_8_another_mesh_goes_on_with_the_same_values(tiny_run: pathlib.Path) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, str(HERE / "other_mesh.py"), str(tiny_run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "devices 8, step 4" in done.stdout and "arrays equal: True" in done.stdout, done.stdout + done.stderr
    assert "less than a hundredth: True" in done.stdout
