"""Replicas of the engine on all devices, behind the interface of one engine.

Every replica has its share of the devices, its own KV pages, slots and worker thread, so none waits for another. What a
sequence samples does not depend on the replica it is played on: its random numbers are named by draw and sample, and
all replicas run the same program.
"""

import contextlib
from collections.abc import AsyncIterator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxrl import mesh as meshes
from jaxrl.config import EngineConfig, ModelConfig
from jaxrl.rollout.counters import Counters, figures, total
from jaxrl.rollout.engine import Engine, Sequence


class Fleet:
    """One engine for each replica of a rollout mesh. One asyncio loop at a time uses it."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        params: SequenceOf[Any],
        mesh: Mesh,
        *,
        stop_ids: SequenceOf[int],
        seed: int,
        version: int = 0,
        launches: contextlib.AbstractContextManager[Any] | None = None,
    ) -> None:
        """Take device memory for the KV pages; nothing is compiled yet.

        Args:
            config: of every replica.
            params: one tree of weights for each replica; see ``Engine``.
            mesh: from ``mesh.make_rollout_mesh``.
            stop_ids, seed, version: see ``Engine``.
            launches: see ``Engine``.

        Raises:
            ConfigError: as for ``Engine``.
            ValueError: there are not as many trees as replicas.
        """
        self.mesh = mesh
        self._slots = config.slots
        self._engines = [
            Engine(config, model, tree, stop_ids=stop_ids, seed=seed, version=version, mesh=replica, launches=launches)
            for tree, replica in zip(params, meshes.replica_meshes(mesh), strict=True)
        ]

    def compile(self) -> None:
        """Compile everything that serving runs, on all replicas side by side."""
        with ThreadPoolExecutor(len(self._engines), thread_name_prefix="jaxrl-compile") as workers:
            list(workers.map(Engine.compile, self._engines))

    @contextlib.asynccontextmanager
    async def between_rounds(self) -> AsyncIterator[None]:
        """No replica runs a round inside; see ``Engine.between_rounds``."""
        async with contextlib.AsyncExitStack() as stack:
            for engine in self._engines:
                await stack.enter_async_context(engine.between_rounds())
            yield

    def release_weights(self) -> None:
        """Free the weights of all replicas before ``set_weights``; see ``Engine``."""
        for engine in self._engines:
            engine.release_weights()

    def set_weights(self, params: SequenceOf[Any], version: int) -> None:
        """Use other weights from each replica's next round on.

        Args:
            params: one tree for each replica.

        Raises:
            ValueError: as for ``Engine.set_weights``, or not as many trees as replicas.
        """
        for engine, tree in zip(self._engines, params, strict=True):
            engine.set_weights(tree, version)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Fleet"]:
        """Run rounds on every replica while inside. On the way out whatever is still open is closed."""
        async with contextlib.AsyncExitStack() as stack:
            for engine in self._engines:
                await stack.enter_async_context(engine.serving())
            yield self

    async def open(
        self,
        prompt_ids: SequenceOf[int] | np.ndarray,
        *,
        draw: int,
        sample: int,
        max_tokens: int,
        temperature: float | None = None,
    ) -> Sequence:
        """Begin a sequence where its group is played, which shares the prompt, as long as a slot is free there or none
        is anywhere: to prefill the prompt again is cheaper than to wait beside idle replicas. Else where the fewest are
        open.

        Arguments and errors as for ``Engine.open``, and ``EngineFailure`` too where only another replica has failed:
        it has nothing open, and would draw every new sequence.
        """
        for engine in self._engines:
            engine.check_serving()
        with_room = [engine for engine in self._engines if engine.load < self._slots] or self._engines
        playing = [engine for engine in with_room if engine.plays(draw)]
        engine = min(playing or with_room, key=lambda engine: engine.load)
        return await engine.open(prompt_ids, draw=draw, sample=sample, max_tokens=max_tokens, temperature=temperature)

    @property
    def counters(self) -> Counters:
        """The sums over all replicas; seconds are engine-seconds."""
        return total([engine.counters for engine in self._engines])

    def stats(self) -> dict[str, float]:
        """As ``Engine.stats``, of all replicas together, with the oldest version of the weights in use."""
        return figures(self.counters) | {"version": min(engine.version for engine in self._engines)}
