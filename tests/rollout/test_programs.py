"""The programs that are traced for shapes alone are those the engine compiles."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxrl import mesh as meshes
from jaxrl.check import environment
from jaxrl.config import MeshConfig
from jaxrl.rollout import programs, rounds
from jaxrl.rollout.engine import Engine
from tests.rollout.conftest import CONFIG, MODEL, STOPS


def test_traced_programs_are_the_engines(params) -> None:
    mesh = meshes.replica_meshes(meshes.make_rollout_mesh(meshes.make_mesh(MeshConfig(), jax.devices()[:1])))[0]
    shapes = programs.abstract_params(MODEL, mesh)
    traced = programs.traced(CONFIG, MODEL, mesh, shapes, stop_ids=len(STOPS))
    engine = Engine(CONFIG, MODEL, params, stop_ids=STOPS, seed=11, mesh=mesh)
    plans = rounds.empty_plans(CONFIG, engine._scheduler.table_width, engine._scheduler.total_pages)
    row, copies, decode = plans
    with jax.set_mesh(engine._mesh):
        real = {
            "prefill": rounds.prefill.trace(
                engine._params, engine._kv_pages, row, model=MODEL, chunk=CONFIG.prefill_chunk
            ),
            "copy": rounds.copy_pages.trace(engine._kv_pages, copies),
            "decode": rounds.decode_round.trace(
                engine._params,
                engine._kv_pages,
                decode,
                np.int32(0),
                engine._key,
                engine._device_stop_ids,
                model=MODEL,
                steps=CONFIG.round_steps,
            ),
        }
    assert traced.keys() == real.keys()
    for name, program in real.items():
        assert str(traced[name].jaxpr) == str(program.jaxpr), name
        assert traced[name].lower().as_text() == program.lower().as_text(), name


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.timeout(600)
def test_on_tpus_the_kernels_run_on_the_pages_as_they_lie(topology: str) -> None:
    """The prompt is read together and by each slot on, and nothing lays out the pages anew."""
    if not environment.installed("tpu"):
        pytest.skip("the compiler for tpu is not installed: jaxrl check --install tpu")
    command = [sys.executable, "-m", "tests.rollout.compiled", topology]
    done = subprocess.run(command, env=environment.variables("tpu"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(answer["program"], answer["kernels"]) for answer in answers] == [("prefill", 1), ("decode", 2)]
    for answer in answers:
        assert answer["temporary"] < answer["keys"] // 2
