"""Slots that read their prompt together: the same tokens as apart, in any company, and the prompt is prefilled once."""

import asyncio
import dataclasses

import jax
import numpy as np
import pytest

from jaxrl.config import EngineConfig, ModelConfig
from jaxrl.rollout.engine import Engine
from jaxrl.rollout.rounds import party_of
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


def test_auto_is_on_where_a_kernel_for_tpus_takes_both_parts_of_what_a_device_computes():
    """And off where plain JAX would compute them, a party after the other: it is faster with every slot by itself."""
    model = ModelConfig(query_heads=64, kv_heads=8, head_width=128, compute_dtype="bfloat16")
    config = EngineConfig(slots=64, group_width=32, max_prompt_tokens=1024, max_response_tokens=7168)

    def party(kind: str = "TPU v5 lite", tensor: int = 1, model: ModelConfig = model, **changes: object) -> int:
        device = jax.sharding.AbstractDevice(kind, 1, kind[:3].lower())
        mesh = jax.sharding.AbstractMesh((tensor,), ("tensor",), abstract_device=device)
        return party_of(dataclasses.replace(config, **changes), model, mesh)

    assert party() == party(tensor=8) == party("cpu", group_decode="on") == 32
    assert party(kv_dtype="int8", page_size=128) == 32
    assert party(group_decode="off") == party("cpu") == party(model=dataclasses.replace(model, attention="xla")) == 0
    with pytest.warns(UserWarning, match="'tpu' is passed over: a head of width 64"):
        assert party(model=dataclasses.replace(model, head_width=64)) == 0
    with pytest.warns(UserWarning, match="'tpu' is passed over: a page of 16 tokens in int8 is no multiple of 128"):
        assert party(kv_dtype="int8") == 0
    with pytest.warns(UserWarning, match="'tpu' is passed over: 256 rows of 490 pages need 133376"):
        assert party(slots=256, max_response_tokens=490 * 16 - 1024) == 0
    named = dataclasses.replace(model, attention="tpu")
    assert party(model=named) == 32 and party(model=named, slots=256, max_response_tokens=490 * 16 - 1024) == 0
