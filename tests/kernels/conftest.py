"""What the tests of kernels in interpreters have in common."""

import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import pytest
from jax._src.pallas.mosaic.interpret import thread_map


@pytest.fixture(scope="session", autouse=True)
def kernels_are_compiled_once() -> Iterator[None]:
    """The interpreters that have threads compile a kernel for every thread of every program of its grid in jax 0.10."""
    if jax.__version_info__ >= (0, 11):
        yield
        return
    lock, programs = threading.Lock(), {}

    def run(jaxpr: jax.extend.core.Jaxpr, consts: list[Any], *args: jax.Array) -> None:
        with lock:
            if id(jaxpr) not in programs:

                def whole(consts: list[Any], *args: jax.Array) -> None:
                    thread_map.jax_core.eval_jaxpr(jaxpr, consts, *args)

                programs[id(jaxpr)] = jax.jit(whole).lower(consts, *args).compile(), jaxpr  # kept, so that ids stay
        programs[id(jaxpr)][0](consts, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thread_map, "_run_jaxpr", run)
        yield
