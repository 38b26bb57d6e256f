"""The rollout engine as its users see it: open a sequence, generate, append, close; rounds run in the background.

All bookkeeping happens on the asyncio loop, between rounds; device work happens in one worker thread, so neither waits
for the other and nothing needs a lock. Results are handed to their waiters before the next round is planned, so whoever
goes on at once is in it, and what they do afterwards (parsing, tools, grading) runs beside it.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl import mesh as meshes
from jaxrl.config import EngineConfig, MeshConfig, ModelConfig
from jaxrl.model import lora, spec
from jaxrl.model.kv_pages import init_pages, page_shardings
from jaxrl.model.transformer import param_specs
from jaxrl.rollout import rounds
from jaxrl.rollout.counters import Counters, figures
from jaxrl.rollout.scheduler import Cycle, Scheduler, Track

SETTLE = 4
"""Turns of the asyncio loop that waiters get, at most, to fill free slots before the next round is planned."""


class PromptTooLong(ValueError):
    """A prompt that the engine was not compiled for."""


class EngineFailure(RuntimeError):
    """The device work failed, or the engine is not serving; ``__cause__`` is the fault."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one call of ``generate`` sampled.

    Attributes:
        logprobs: of each token under the untruncated distribution at the sequence's temperature (nats).
        versions: weights that sampled each token.
        stopped: a stop id was sampled; it is the last id.
        seconds: duration of the rounds it took part in; what it waited for a slot or for pages is not counted.
        experts: as in ``Trajectory``, of the sequence up to here: its prompt, and all of its response.
    """

    ids: np.ndarray  # [T] int32
    logprobs: np.ndarray  # [T] float32
    versions: np.ndarray  # [T] int32
    stopped: bool
    seconds: float = 0.0
    experts: np.ndarray | None = None  # [tokens, L, experts of a token] int8 or int16


class Sequence:
    """One prompt and its response, made by ``Engine.open``. Use it from the engine's asyncio loop."""

    def __init__(self, engine: "Engine", track: Track) -> None:
        self._engine = engine
        self._track = track

    @property
    def remaining(self) -> int:
        """Response tokens left of ``max_tokens``."""
        return self._track.max_tokens - self._track.response_tokens

    async def generate(self, max_new_tokens: int) -> Sample:
        """Sample until a stop id, ``max_new_tokens``, or the end of the sequence's budget.

        Cancelling the call closes the sequence.

        Raises:
            ValueError: the budget is used up, or the sequence is closed or already generating.
            EngineFailure: the device work failed.
        """
        track = self._track
        if track.closed or track.generating:
            raise ValueError(f"sequence is {'closed' if track.closed else 'already generating'}")
        if min(max_new_tokens, self.remaining) < 1:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} and {self.remaining} of max_tokens={track.max_tokens} left: "
                "nothing can be sampled; close the sequence"
            )
        try:
            return await self._engine._generate(track, min(max_new_tokens, self.remaining))
        except asyncio.CancelledError:
            self.close()
            raise

    def append(self, ids: SequenceOf[int] | np.ndarray) -> None:
        """Add tokens the environment wrote; they are prefilled before the next ``generate``.

        Raises:
            ValueError: they exceed the sequence's budget, or the sequence is closed or generating.
        """
        track = self._track
        if track.closed or track.generating:
            raise ValueError(f"sequence is {'closed' if track.closed else 'generating'}; nothing can be appended")
        if len(ids) > self.remaining:
            raise ValueError(
                f"{len(ids)} tokens to append but {self.remaining} of max_tokens={track.max_tokens} are left; "
                "end the episode, or open the sequence with more"
            )
        self._engine._scheduler.append(track, np.asarray(ids, np.int32).tolist())

    def close(self) -> None:
        """Give pages and slot back. Idempotent."""
        self._engine._close(self._track)


@dataclasses.dataclass(eq=False)
class _Waiting:
    """A ``generate`` call in progress."""

    future: asyncio.Future[Sample]
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Output:
    """What came of a cycle."""

    cycle: Cycle
    tokens: np.ndarray  # [steps, S] int32, -1 = none
    logprobs: np.ndarray  # [steps, S] float32
    prefill_seconds: float
    decode_seconds: float
    experts: dict[int, np.ndarray]  # of the slots whose generation has ended, where experts are recorded


class Engine:
    """Samples many sequences together on the devices of one replica. One asyncio loop at a time uses it."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        params: Any,
        *,
        stop_ids: SequenceOf[int],
        seed: int,
        version: int = 0,
        mesh: Mesh | None = None,
        launches: contextlib.AbstractContextManager[Any] | None = None,
    ) -> None:
        """Take device memory for the KV pages; nothing is compiled yet.

        Args:
            params: weights in the type the model computes in. They are used as they are, not copied: whoever donates
                them elsewhere gives the engine a copy.
            stop_ids: a sampled one ends the generation.
            seed: with draw, sample and index in the response it is the random key of a token.
            version: name of these weights.
            mesh: the replica's devices, with no axis but ``tensor`` that is longer than 1; the first device when None.
            launches: held while device work is handed over, where others hand work to the same devices as well:
                programs with collectives must reach all of their devices in the same order, or they wait for each
                other for ever. None where nobody else does.

        Raises:
            ConfigError: the KV pages cannot hold one longest sequence, or the ``tensor`` axis cannot split the model.
        """
        self._config = config
        self._model = model
        self._scheduler = Scheduler(config)
        self._stop_ids = frozenset(int(stop) for stop in stop_ids)
        self._mesh = mesh or meshes.make_mesh(MeshConfig(), jax.devices()[:1])
        self._launches = launches or contextlib.nullcontext()
        self._shardings = spec.shardings(
            lora.specs_with_adapters(param_specs(model), params), self._mesh, meshes.ROLLOUT_RULES
        )
        self._party = rounds.party_of(config, model, self._mesh)
        self._params: Any | None = jax.device_put(params, self._shardings)
        self._layout = _layout(self._params)
        self._version = version
        self._next_weights: tuple[Any, int] | None = None
        stops = np.full(rounds.padded_stops(len(self._stop_ids)), -1, np.int32)
        stops[: len(self._stop_ids)] = sorted(self._stop_ids)
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._device_stop_ids = jax.device_put(stops, everywhere)
        self._key = jax.device_put(jax.random.key(seed), everywhere)
        sizes = model, self._scheduler.total_pages, config.page_size, config.record_experts, config.kv_dtype
        pages_split = page_shardings(self._mesh, jax.eval_shape(lambda: init_pages(*sizes)))
        self._kv_pages = jax.jit(init_pages, static_argnums=range(5), out_shardings=pages_split)(*sizes)
        self._counters = Counters(pages=self._scheduler.total_pages)
        self._tickets = itertools.count()
        self._opening: dict[Track, asyncio.Future[None]] = {}
        self._waiting: dict[Track, _Waiting] = {}
        self._wake: asyncio.Event | None = None  # there is one while serving
        self._serving_since = 0.0
        self._round = asyncio.Lock()  # held while a round runs and is delivered
        self._failure: BaseException | None = None

    def compile(self) -> None:
        """Compile everything that serving runs, by running it once on empty plans."""
        scheduler = self._scheduler
        row, copies, decode = rounds.empty_plans(self._config, scheduler.table_width, scheduler.total_pages)
        # Not a word to ``launches``: replicas share no device, and would compile one after the other.
        self._run(Cycle((row,), (copies,), (), decode, 0, 0), contextlib.nullcontext())
        if self._config.record_experts:
            self._recorded_experts(decode[0], 0, contextlib.nullcontext())

    @contextlib.asynccontextmanager
    async def between_rounds(self) -> AsyncIterator[None]:
        """No round runs inside, so that the weights may be released and replaced; sequences stay open and wait."""
        async with self._round:
            yield

    def release_weights(self) -> None:
        """Free the memory of the weights, so that two copies are never held; ``set_weights`` must follow.

        The arrays handed to the engine are deleted.

        Raises:
            ValueError: a round may be using them; see ``between_rounds``.
        """
        if self._wake is not None and not self._round.locked():
            raise ValueError("weights are released inside `async with engine.between_rounds()`")
        for leaf in jax.tree.leaves(self._params):
            leaf.delete()
        self._params = None

    def set_weights(self, params: Any, version: int) -> None:
        """Use other weights from the next round on. Running sequences go on; their tokens carry the version.

        Raises:
            ValueError: shapes or types differ from the weights the engine was compiled for.
        """
        if _layout(params) != self._layout:
            raise ValueError("the new weights have other names, shapes or types than those the engine was made with")
        self._next_weights = (jax.device_put(params, self._shardings), version)
        if self._wake is None or self._params is None:
            self._swap_weights()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Engine"]:
        """Run rounds in the background while inside. On the way out whatever is still open is closed."""
        if self._wake is not None:
            raise EngineFailure("the engine is already serving")
        self._wake = wake = asyncio.Event()
        self._round = asyncio.Lock()
        self._serving_since = time.perf_counter()
        with ThreadPoolExecutor(1, thread_name_prefix="jaxrl-engine") as worker:
            task = asyncio.create_task(self._serve(wake, worker))
            try:
                yield self
            finally:
                self._wake = None
                wake.set()
                await asyncio.wait([task])  # the round on the device ends first
                self._counters.serving_seconds += time.perf_counter() - self._serving_since
                self._fail(EngineFailure("the engine has stopped serving"))

    async def open(
        self,
        prompt_ids: SequenceOf[int] | np.ndarray,
        *,
        draw: int,
        sample: int,
        max_tokens: int,
        temperature: float | None = None,
    ) -> Sequence:
        """Begin a sequence; waits until the KV pages have room for it.

        Args:
            prompt_ids: [n] prompt tokens, at least one.
            draw: draw of the problem stream and
            sample: index in the group: together they name the sequence's random numbers.
            max_tokens: response tokens, tool output included.
            temperature: of sampling; the configuration's when None, 0 = greedy.

        Raises:
            PromptTooLong: before anything is queued.
            ValueError: an empty prompt, or a ``max_tokens`` or temperature out of range.
            EngineFailure: the device work failed, or the engine is not serving.
        """
        config = self._config
        prompt = np.asarray(prompt_ids, np.int32)
        temperature = config.temperature if temperature is None else temperature
        if len(prompt) > config.max_prompt_tokens:
            raise PromptTooLong(
                f"max_prompt_tokens={config.max_prompt_tokens} but the prompt of draw {draw} has {len(prompt)} tokens; "
                "raise EngineConfig.max_prompt_tokens or leave the problem out"
            )
        if not len(prompt):
            raise ValueError(f"the prompt of draw {draw} is empty; it needs at least one token")
        if not 1 <= max_tokens <= config.max_response_tokens:
            raise ValueError(
                f"max_tokens={max_tokens} is outside 1 ... max_response_tokens={config.max_response_tokens}; "
                "raise EngineConfig.max_response_tokens"
            )
        if not temperature >= 0.0:
            raise ValueError(f"temperature={temperature} must be at least 0")
        self.check_serving()
        track = Track(
            ticket=next(self._tickets),
            prompt=prompt,
            draw=_int32(draw),
            sample=_int32(sample),
            max_tokens=max_tokens,
            temperature=temperature,
            key=prompt.tobytes(),
            tokens=prompt.tolist(),
        )
        queued = time.perf_counter()
        future = self._opening[track] = asyncio.get_running_loop().create_future()
        self._scheduler.submit(track)
        self._changed()
        try:
            await future
        except BaseException:
            self._close(track)
            raise
        waited = time.perf_counter() - queued
        self._counters.opened += 1
        self._counters.queue_seconds += waited
        self._counters.longest_queue_seconds = max(self._counters.longest_queue_seconds, waited)
        return Sequence(self, track)

    def check_serving(self) -> None:
        """Whether sequences can be opened and generate.

        Raises:
            EngineFailure: the device work failed, or the engine is not serving.
        """
        if self._failure is not None:
            raise EngineFailure(f"the engine failed earlier: {self._failure}") from self._failure
        if self._wake is None:
            raise EngineFailure("the engine is not serving; use it inside `async with engine.serving()`")

    @property
    def load(self) -> int:
        """Sequences that are open, queued ones included."""
        return self._scheduler.open

    def plays(self, draw: int) -> bool:
        """Whether a sequence of this draw is open, whose prompt another one would share."""
        return self._scheduler.plays(_int32(draw))

    @property
    def version(self) -> int:
        """Name of the weights in use."""
        return self._version

    @property
    def counters(self) -> Counters:
        """What was done since the engine was made, and the state now."""
        scheduler, serving = self._scheduler, time.perf_counter() - self._serving_since if self._wake else 0.0
        return dataclasses.replace(
            self._counters,
            serving_seconds=self._counters.serving_seconds + serving,
            preemptions=scheduler.preemptions,
            pages_used=scheduler.allocator.used,
            queued=scheduler.queued,
            admitted=scheduler.admitted,
        )

    def stats(self) -> dict[str, float]:
        """Counters and what follows from them (``counters.figures``), and the version of the weights."""
        return figures(self.counters) | {"version": self._version}

    async def _generate(self, track: Track, max_new_tokens: int) -> Sample:
        self.check_serving()
        waiting = self._waiting[track] = _Waiting(asyncio.get_running_loop().create_future())
        self._scheduler.generate(track, max_new_tokens)
        self._changed()
        return await waiting.future

    def _close(self, track: Track) -> None:
        self._scheduler.close(track)
        self._opening.pop(track, None)
        waiting = self._waiting.pop(track, None)
        if waiting is not None and not waiting.future.done():
            waiting.future.set_exception(ValueError("the sequence was closed while it was generating"))
        self._changed()

    def _changed(self) -> None:
        """Let in whom the pages allow now, and have the background task look again."""
        self._admit()
        if self._wake is not None:
            self._wake.set()

    def _admit(self) -> None:
        for track in self._scheduler.admit():
            opening = self._opening.pop(track, None)
            if opening is not None and not opening.done():
                opening.set_result(None)

    def _fail(self, error: BaseException) -> None:
        """End every pending call with this error and give all pages back."""
        futures = [*self._opening.values(), *(waiting.future for waiting in self._waiting.values())]
        self._opening.clear()
        self._waiting.clear()
        self._scheduler.close_all()
        for future in futures:
            if not future.done():
                future.set_exception(error)

    async def _serve(self, wake: asyncio.Event, worker: ThreadPoolExecutor) -> None:
        """Plan, run, deliver, until serving ends or the device work fails."""
        loop = asyncio.get_running_loop()
        try:
            while self._wake is wake:
                await wake.wait()
                wake.clear()
                while self._wake is wake:
                    async with self._round:
                        cycle = self._plan()
                        if cycle is None:
                            break
                        self._deliver(await loop.run_in_executor(worker, self._run, cycle, self._launches))
                    for _ in range(SETTLE):
                        if self._scheduler.full:
                            break
                        await asyncio.sleep(0)
        except BaseException as error:
            self._failure = error
            failure = EngineFailure(f"the device work failed: {error!r}")
            failure.__cause__ = error
            self._fail(failure)
            if not isinstance(error, Exception):
                raise

    def _plan(self) -> Cycle | None:
        if self._next_weights is not None:
            self._swap_weights()
        self._admit()
        return self._scheduler.plan()

    def _swap_weights(self) -> None:
        assert self._next_weights is not None
        self._params, self._version = self._next_weights
        self._next_weights = None
        self._scheduler.weights_changed()

    def _run(self, cycle: Cycle, launches: contextlib.AbstractContextManager[Any]) -> _Output:
        """Device work of one cycle, in the worker thread."""
        started = time.perf_counter()
        config, kv_pages = self._config, self._kv_pages
        with launches, jax.set_mesh(self._mesh):
            for plan in cycle.prompts:
                kv_pages = rounds.prefill(self._params, kv_pages, plan, model=self._model, chunk=config.prefill_chunk)
            for plan in cycle.copies:
                kv_pages = rounds.copy_pages(kv_pages, plan)
            for plan in cycle.texts:
                kv_pages = rounds.prefill(self._params, kv_pages, plan, model=self._model, chunk=config.prefill_chunk)
        if cycle.prefill_tokens:
            jax.block_until_ready(kv_pages)
        prefilled = time.perf_counter()
        with launches, jax.set_mesh(self._mesh):
            self._kv_pages, output = rounds.decode_round(
                self._params,
                kv_pages,
                cycle.decode,
                np.int32(cycle.exit_at),
                self._key,
                self._device_stop_ids,
                model=self._model,
                steps=config.round_steps,
                party=self._party,
            )
        tokens, logprobs = rounds.read_round(output)
        decoded, experts = time.perf_counter(), {}
        if config.record_experts:
            for slot, row in enumerate(cycle.decode):
                ids = tokens[tokens[:, slot] >= 0, slot]
                if len(ids) and (len(ids) == row[rounds.LEFT] or int(ids[-1]) in self._stop_ids):
                    experts[slot] = self._recorded_experts(row, row[rounds.POSITION] + len(ids), launches)
        return _Output(cycle, tokens, logprobs, prefilled - started, decoded - prefilled, experts)

    def _recorded_experts(
        self, row: np.ndarray, computed: int, launches: contextlib.AbstractContextManager[Any]
    ) -> np.ndarray:
        """The experts of a slot's sequence, of which ``computed`` tokens are in pages and one more is sampled."""
        with launches, jax.set_mesh(self._mesh):
            experts = rounds.recorded_experts(self._kv_pages.experts, row[rounds.TABLE :])
        return np.pad(np.asarray(experts)[:computed], ((0, 1), (0, 0), (0, 0)), constant_values=-1)

    def _deliver(self, output: _Output) -> None:
        """Book what a round sampled and hand finished generations to their waiters."""
        sampled = output.tokens >= 0
        counts = sampled.sum(axis=0)
        counters = self._counters
        counters.rounds += 1
        counters.decode_tokens += int(counts.sum())
        steps = int(sampled.any(axis=1).sum())
        counters.decode_steps += steps
        counters.slot_steps += steps * self._config.slots
        counters.prefill_tokens += output.cycle.prefill_tokens
        counters.prefill_calls += len(output.cycle.prompts) + len(output.cycle.texts)
        counters.prefill_seconds += output.prefill_seconds
        counters.decode_seconds += output.decode_seconds
        for track in self._scheduler.decoding:
            count, slot = counts[track.slot], track.slot
            ids = output.tokens[:count, slot].tolist()
            stopped = bool(ids) and ids[-1] in self._stop_ids
            waiting = self._waiting[track]
            waiting.ids += ids
            waiting.logprobs.append(output.logprobs[:count, slot])
            waiting.versions += [self._version] * len(ids)
            waiting.seconds += output.prefill_seconds + output.decode_seconds
            if self._scheduler.commit(track, ids, stopped):
                del self._waiting[track]
                if not waiting.future.done():
                    waiting.future.set_result(
                        Sample(
                            np.array(waiting.ids, np.int32),
                            np.concatenate(waiting.logprobs),
                            np.array(waiting.versions, np.int32),
                            stopped,
                            waiting.seconds,
                            output.experts.get(slot),
                        )
                    )


def _layout(params: Any) -> Any:
    """Names, shapes and types of weights."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)


def _int32(value: int) -> int:
    """The same 32 bits as a signed number, which is what plans carry."""
    return (value + 2**31) % 2**32 - 2**31
