"""The programs that are traced for shapes alone are those the engine compiles."""

import collections
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxrl import mesh as meshes
from jaxrl.check import environment
from jaxrl.config import MeshConfig
from jaxrl.rollout import programs, rounds
from jaxrl.rollout.engine import Engine
from jaxrl.rollout.scheduler import pages_of
from tests.rollout.conftest import CONFIG, MODEL, STOPS


def one_device() -> jax.sharding.Mesh:
    return meshes.replica_meshes(meshes.make_rollout_mesh(meshes.make_mesh(MeshConfig(), jax.devices()[:1])))[0]


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_traced_programs_are_the_engines(params, kv_dtype: str) -> None:
    config, mesh = dataclasses.replace(CONFIG, kv_dtype=kv_dtype), one_device()
    shapes = programs.abstract_params(MODEL, mesh)
    traced = programs.traced(config, MODEL, mesh, shapes, stop_ids=len(STOPS))
    engine = Engine(config, MODEL, params, stop_ids=STOPS, seed=11, mesh=mesh)
    plans = rounds.empty_plans(config, engine._scheduler.table_width, engine._scheduler.total_pages)
    row, copies, decode = plans
    with jax.set_mesh(engine._mesh):
        real = {
            "prefill": rounds.prefill.trace(
                engine._params, engine._kv_pages, row, model=MODEL, chunk=config.prefill_chunk
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
                steps=config.round_steps,
            ),
        }
    assert traced.keys() == real.keys()
    for name, program in real.items():
        assert str(traced[name].jaxpr) == str(program.jaxpr), name
        assert traced[name].lower().as_text() == program.lower().as_text(), name


def test_lists_of_steps_and_page_tables_are_made_once_for_all_layers() -> None:
    """A list takes one cumulative sum. There is one of rows with a window, and one without or one of each part."""
    config, mesh = dataclasses.replace(CONFIG, group_decode="on"), one_device()
    sums: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for attention, sign in (("xla", -1), ("tpu_interpreted", 1)):
        model = dataclasses.replace(MODEL, attention=attention, sliding_window=8, sliding_layers=(1,))
        traced = programs.traced(config, model, mesh, programs.abstract_params(model, mesh))
        for name in ("prefill", "decode"):
            for equation, layers in operations(traced[name].jaxpr.jaxpr):
                sums[name][equation.primitive.name, layers] += sign
                assert not (layers and equation.primitive.name == "gather" and is_table(equation.outvars[0].aval))
    for name, lists in (("prefill", 2), ("decode", 4)):
        assert sums[name]["pallas_call", True] > 0 == sums[name]["cumsum", True]
        assert sums[name]["cumsum", False] == lists


def is_table(array: jax.core.ShapedArray) -> bool:
    return array.dtype == np.int32 and array.shape[1:] == (pages_of(CONFIG)[0],)


def operations(jaxpr: jax.extend.core.Jaxpr, scanned: bool = False) -> Iterator[tuple[jax.extend.core.JaxprEqn, bool]]:
    """All of them, and whether they are repeated by a scan, as those of a layer are."""
    for equation in jaxpr.eqns:
        yield equation, scanned
        for inner in jaxprs_in_params(equation.params):
            yield from operations(inner, scanned or equation.primitive.name == "scan")


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.timeout(600)
def test_on_tpus_the_kernels_run_on_the_pages_as_they_lie(topology: str) -> None:
    """The prompt is read together and by each slot on, and nothing lays out pages or their scales anew."""
    if not environment.installed("tpu"):
        pytest.skip("the compiler for tpu is not installed: jaxrl check --install tpu")
    command = [sys.executable, "-m", "tests.rollout.compiled", topology]
    done = subprocess.run(command, env=environment.variables("tpu"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(answer["program"], answer["kernels"]) for answer in answers] == 2 * [("prefill", 1), ("decode", 2)]
    for answer in answers:
        assert answer["temporary"] < answer["smallest"] // 2
