import json
import pathlib
import struct
import subprocess
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxrl.observe.writers import METRICS_FILE, TENSORBOARD_FOLDER, MetricsWriter, read_metrics


def events(folder: pathlib.Path) -> list[Event]:
    """All TensorBoard events of a run: records of (length, checksum, bytes, checksum)."""
    found = []
    for path in sorted((folder / TENSORBOARD_FOLDER).iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_rows_are_on_disk_before_write_returns(tmp_path: pathlib.Path) -> None:
    program = f"""
import os, pathlib, signal
from jaxrl.observe.writers import MetricsWriter
writer = MetricsWriter(pathlib.Path({str(tmp_path)!r}))
writer.write(1, "rl", {{"loss": 0.5}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert killed.returncode == -9
    assert read_metrics(tmp_path) == [{"step": 1, "kind": "rl", "loss": 0.5}]


def test_resuming_drops_rows_beyond_the_step_and_a_torn_last_row(tmp_path: pathlib.Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(5):
            writer.write(step, "rl", {"loss": step})
        writer.write(2, "eval", {"pass_rate": 0.5})
        writer.write(4, "eval", {"pass_rate": 0.6})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 1, "kind"')
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, "rl", {"loss": 30})
    assert [row["loss"] for row in read_metrics(tmp_path, "rl")] == [0, 1, 2, 30]
    assert [row["step"] for row in read_metrics(tmp_path, "eval")] == [2]
    assert not list(tmp_path.glob("*.tmp"))


def test_starting_over_drops_every_row(tmp_path: pathlib.Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, "rl", {"loss": 1})
    with MetricsWriter(tmp_path):
        pass
    assert read_metrics(tmp_path) == []


def test_values_that_are_not_finite_are_valid_json(tmp_path: pathlib.Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, "rl", {"loss": float("nan"), "norm": float("inf"), "rate": 0.1})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    row = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)
    assert row == {"step": 0, "kind": "rl", "loss": None, "norm": None, "rate": 0.1}


def test_tensorboard_holds_the_scalars_and_is_told_what_a_resumed_run_repeats(tmp_path: pathlib.Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, "rl", {"loss": 0.25})
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, "rl", {"loss": 0.5})
    found = events(tmp_path)
    values = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
    assert values == [(3, "rl/loss", 0.25), (3, "rl/loss", 0.5)]
    purges = [e.step for e in found if e.session_log.status == SessionLog.SessionStatus.START]
    assert purges[-1] == 3


def test_a_broken_row_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 0, "kind": "rl"}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is not JSON"):
        read_metrics(tmp_path)
