"""A tiny decoder, and scripted multi-turn episodes to play with it."""

import asyncio
import dataclasses

import jax
import numpy as np
import pytest

from jaxrl.config import EngineConfig, ModelConfig
from jaxrl.model import spec, transformer
from jaxrl.rollout.engine import Engine, Sample

MODEL = ModelConfig(
    vocab_size=152, layers=2, width=64, query_heads=4, kv_heads=2, head_width=16, ffn_width=96, init_scale=0.25
)
CONFIG = EngineConfig(
    slots=8, page_size=4, round_steps=4, prefill_rows=2, prefill_chunk=8, max_prompt_tokens=24, max_response_tokens=56
)
STOPS = (3, 5, 17)
TURNS = 3


@pytest.fixture(scope="session")
def params():
    return spec.initialize(transformer.param_specs(MODEL), jax.random.key(0))


def make_engine(params, stops=STOPS, version=0, seed=11, model=MODEL, **changes) -> Engine:
    return Engine(dataclasses.replace(CONFIG, **changes), model, params, stop_ids=stops, seed=seed, version=version)


def prompt_of(draw: int) -> np.ndarray:
    generator = np.random.default_rng(draw)
    return generator.integers(20, MODEL.vocab_size, generator.integers(1, 25)).astype(np.int32)


def tool_output(draw: int, sample: int, turn: int) -> np.ndarray:
    generator = np.random.default_rng((draw, sample, turn))
    return generator.integers(20, MODEL.vocab_size, generator.integers(1, 12)).astype(np.int32)


@dataclasses.dataclass
class Played:
    """One scripted episode."""

    prompt: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    samples: list[Sample]


async def play(engine, draw, sample, pause=lambda: None, temperature=None) -> Played:
    """Three turns with tool output between them; ``pause`` returns the seconds a tool takes, None = no tool."""
    prompt = prompt_of(draw)
    ids, mask, logprobs, samples = [], [], [], []
    sequence = await engine.open(prompt, draw=draw, sample=sample, max_tokens=56, temperature=temperature)
    try:
        for turn in range(TURNS):
            samples.append(await sequence.generate(10))
            ids += samples[-1].ids.tolist()
            logprobs += samples[-1].logprobs.tolist()
            mask += [1] * len(samples[-1].ids)
            if turn < TURNS - 1:
                seconds = pause()
                if seconds is not None:
                    await asyncio.sleep(seconds)
                output = tool_output(draw, sample, turn)
                sequence.append(output)
                ids += output.tolist()
                logprobs += [0.0] * len(output)
                mask += [0] * len(output)
    finally:
        sequence.close()
    return Played(prompt, np.array(ids), np.array(mask), np.array(logprobs, np.float32), samples)


def play_all(engine, names, **arguments) -> dict[tuple[int, int], Played]:
    """Play episodes (draw, sample) together, opened in the order given."""

    async def run():
        async with engine.serving():
            return await asyncio.gather(*(play(engine, draw, sample, **arguments) for draw, sample in names))

    return dict(zip(names, asyncio.run(asyncio.wait_for(run(), 120)), strict=True))
