"""The launch files, as far as they can be tried without their clusters: stand-ins write down what they get."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys

import pytest
import yaml

from jaxrl.cli import _parser
from jaxrl.processes.join import Place, place
from tests.several import REPOSITORY, started

LAUNCH = REPOSITORY / "launch"
ARGUMENTS = ["rstar2_14b", "--run", "/shared/runs/with space", "--set", "TrainConfig.steps=7"]


def stand_in(folder: pathlib.Path, name: str, script: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/bash\n{script}\n")
    file.chmod(0o755)


def run(folder: pathlib.Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | variables
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def heard(lines: list[str]) -> tuple[Place, list[str]]:
    """What a stand-in of jaxrl wrote: its environment's place, and its arguments."""
    address, count, index, *arguments = lines
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    return place(None, None, None, 300, dict(zip(names, (address, count, index), strict=True))), arguments


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu_pod.sh"])
def test_scripts_are_bash(script: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


def test_slurm_gives_every_task_its_place(tmp_path: pathlib.Path) -> None:
    stand_in(tmp_path, "scontrol", 'printf "node7\\nnode8\\n"')
    stand_in(
        tmp_path,
        "srun",
        '[[ " $* " == *" --cpu-bind=none "* ]] || exit 9; '
        'while [[ $1 == --* ]]; do shift; done; for i in 0 1; do SLURM_PROCID=$i "$@" || exit; done',
    )
    variables = '"$JAX_COORDINATOR_ADDRESS" "$JAX_NUM_PROCESSES" "$JAX_PROCESS_ID"'
    stand_in(tmp_path, "jaxrl", f'printf "%s\\n" {variables} "$@" end')
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "70123", "SLURM_NTASKS": "2"}
    done = run(tmp_path, "slurm.sbatch", *ARGUMENTS, **job)
    assert done.returncode == 0, done.stderr
    for index, lines in enumerate(done.stdout.strip().removesuffix("\nend").split("\nend\n")):
        found, arguments = heard(lines.split("\n"))
        assert found == Place("node7:20123", 2, index, 300)
        assert arguments == ["train", *ARGUMENTS]


def test_a_pod_gets_the_checkout_and_every_host_the_command(tmp_path: pathlib.Path) -> None:
    stand_in(tmp_path, "gcloud", f'printf "%s\\n" "$@" end >> {tmp_path}/calls; [[ $4 != scp ]] || tar tzf "$5"')
    done = run(tmp_path, "tpu_pod.sh", "pod", "us-east5-b", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    assert "jaxrl/pyproject.toml" in done.stdout.split()
    calls = [call.split("\n") for call in (tmp_path / "calls").read_text().strip().split("\nend")][:-1]
    assert all("--worker=all" in call and "--zone=us-east5-b" in call for call in calls)
    (command,) = (part for part in calls[-1] if part.startswith("--command="))
    program, *arguments = shlex.split(command.removeprefix("--command="))
    assert program == "jaxrl-venv/bin/jaxrl"
    options = _parser().parse_args(arguments)
    assert (options.config, str(options.run), options.set) == (ARGUMENTS[0], ARGUMENTS[2], ARGUMENTS[4:])


def test_a_pod_without_a_recipe_shows_how(tmp_path: pathlib.Path) -> None:
    done = run(tmp_path, "tpu_pod.sh", "pod", "us-east5-b")
    assert done.returncode == 2
    assert "launch/tpu_pod.sh NAME ZONE rstar2_14b" in done.stderr


def test_kubernetes_pods_know_their_place() -> None:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec, name = job["spec"], job["metadata"]["name"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    variables = {variable["name"]: variable.get("value", "2") for variable in container["env"]}
    assert place(None, None, None, 300, variables) == Place(f"{name}-0.{pod['subdomain']}:8476", 4, 2, 300)
    assert spec["completions"] == spec["parallelism"] == 4 and spec["completionMode"] == "Indexed"
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["selector"] == {"job-name": name}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert _parser().parse_args(container["command"][1:]).config == "rstar2_14b"


def test_local_processes_end_together_and_say_how() -> None:
    """The run folder cannot be made, so every process fails; the launcher has the exit code of the first."""
    command = [sys.executable, str(LAUNCH / "local.py"), "2", "--devices", "1", "--", "train", "smoke", "--run"]
    with started([*command, "/proc/none"], 1) as launcher:
        _, said = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert "run folder /proc/none cannot be written" in said


def test_local_processes_see_gpus_of_their_own(tmp_path: pathlib.Path) -> None:
    """A stand-in of the package writes down what each process sees."""
    said = "import os, sys; open(sys.argv[-1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    (tmp_path / "jaxrl").mkdir()
    (tmp_path / "jaxrl" / "__main__.py").write_text(said)
    command = [sys.executable, str(LAUNCH / "local.py"), "2", "--gpus", "2", "--", "train", "smoke"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    assert [(tmp_path / process).read_text() for process in "01"] == ["0,1", "2,3"]


def test_signals_reach_all_local_processes() -> None:
    command = [sys.executable, str(LAUNCH / "local.py"), "2", "--port", "1", "--", "train", "smoke", "--wait", "600"]
    with started(command, 1) as launcher:
        children = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        while len(children.read_text().split()) < 2:
            assert launcher.poll() is None
        launcher.send_signal(signal.SIGTERM)
        launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_fewer_than_one_process_is_refused(count: str) -> None:
    command = [sys.executable, str(LAUNCH / "local.py"), "--devices", count, "2", "--", "train", "smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"{count} is no number of at least 1" in done.stderr
