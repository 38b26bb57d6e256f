"""Slots that read their prompt together: the same tokens as apart, in any company, and the prompt is prefilled once."""

import asyncio
import dataclasses

import numpy as np
import pytest

from jaxrl.rollout.engine import Engine
from tests.rollout.conftest import CONFIG, MODEL, make_engine, play_all

NAMES = [(7, 0), (7, 1), (7, 2), (7, 3), (16, 0), (16, 1), (28, 0), (11, 0)]
"""Groups of four, two and one with 5, 3 and 3 full pages of prompt, and a prompt that fills none."""


@pytest.fixture(scope="module")
def together(params):
    engine = make_engine(params, group_decode="on", group_width=3)
    return engine, play_all(engine, NAMES)


def test_rows_that_read_together_play_as_those_that_do_not(params, together):
    apart = play_all(make_engine(params), NAMES)
    for name, played in together[1].items():
        np.testing.assert_array_equal(played.ids, apart[name].ids, err_msg=str(name))
        np.testing.assert_allclose(played.logprobs, apart[name].logprobs, atol=1e-5)
    assert any((played.logprobs != apart[name].logprobs).any() for name, played in together[1].items())


def test_promise_2_company_and_order_change_no_bit(together):
    engine, before = together
    for names in (NAMES[::-1], NAMES[1:2], NAMES[2:5]):
        for name, played in play_all(engine, names).items():
            np.testing.assert_array_equal(played.ids, before[name].ids)
            np.testing.assert_array_equal(played.logprobs, before[name].logprobs)


@pytest.mark.parametrize("group_decode", ["off", "on"])
def test_the_prompt_of_a_group_is_prefilled_once(params, group_decode):
    """A group of 16 with a prompt of 1,024 tokens: all but its last token, which decoding takes."""
    changes = {"slots": 16, "page_size": 16, "prefill_chunk": 64, "prefill_rows": 4, "max_prompt_tokens": 1024}
    config = dataclasses.replace(CONFIG, **changes, group_decode=group_decode)
    engine = Engine(config, MODEL, params, stop_ids=(), seed=3)
    prompt = np.random.default_rng(0).integers(20, MODEL.vocab_size, 1024).astype(np.int32)

    async def one(sample: int) -> int:
        sequence = await engine.open(prompt, draw=0, sample=sample, max_tokens=4)
        return len((await sequence.generate(4)).ids)

    async def run() -> list[int]:
        async with engine.serving():
            return await asyncio.gather(*(one(sample) for sample in range(16)))

    assert asyncio.run(run()) == [4] * 16
    assert engine.counters.prefill_tokens == 1023
    assert engine.counters.prefill_calls == 4
