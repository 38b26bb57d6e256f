"""What the engine promises its users."""

import asyncio
import functools
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.model.logprob import logits, sequence_logprobs
from jaxrl.model.transformer import hidden_states
from jaxrl.rollout import rounds
from jaxrl.rollout.engine import EngineFailure, PromptTooLong
from tests.rollout.conftest import CONFIG, MODEL, STOPS, make_engine, play, play_all, prompt_of

NAMES = [(draw, sample) for draw in range(4) for sample in range(4)]


@pytest.fixture(scope="module")
def plain(params):
    """The episodes as they come out when nothing is special."""
    return play_all(make_engine(params), NAMES)


def assert_same(first, second):
    for name, played in first.items():
        np.testing.assert_array_equal(played.ids, second[name].ids, err_msg=str(name))
        np.testing.assert_array_equal(played.logprobs, second[name].logprobs, err_msg=str(name))


@functools.partial(jax.jit, static_argnames="temperature")
def trainers_view(params, tokens, segment_ids, temperature):
    """Log-probabilities by the path the trainer uses, and the likeliest next tokens."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    stats = sequence_logprobs(params, MODEL, tokens, positions, segment_ids, temperature)
    hidden = hidden_states(params, MODEL, tokens, positions, segment_ids)
    return stats.logprobs, logits(params, MODEL, hidden).argmax(-1)


def scored(params, played, temperature):
    """Of the response: log-probabilities of its tokens, and what the policy would have liked best in their place."""
    row = np.concatenate([played.prompt, played.ids])
    longest = CONFIG.max_prompt_tokens + CONFIG.max_response_tokens
    tokens = np.pad(row, (0, longest - len(row)))[None].astype(np.int32)
    logprobs, best = trainers_view(params, tokens, (np.arange(longest) < len(row))[None].astype(np.int32), temperature)
    start, end = len(played.prompt), len(row)
    return np.asarray(logprobs)[0, start:end], np.asarray(best)[0, start - 1 : end - 1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_promise_1_sampled_logprobs_are_the_trainers(params, temperature):
    episodes = play_all(make_engine(params), NAMES[:6], temperature=temperature)
    sampled = 0
    for played in episodes.values():
        difference = (scored(params, played, temperature)[0] - played.logprobs) * played.mask
        assert np.abs(difference).max() < 1e-5
        sampled += played.mask.sum()
    assert sampled > 60


def test_promise_2_admission_order_neighbours_and_tool_time_change_nothing(params, plain):
    order = random.Random(1)
    shuffled = order.sample(NAMES, len(NAMES))
    assert_same(plain, play_all(make_engine(params), shuffled))
    assert_same(plain, play_all(make_engine(params), shuffled, pause=lambda: order.choice([None, 0, 0.002, 0.02])))
    others = [(draw, sample) for draw in range(10, 14) for sample in range(3)]
    mixed = play_all(make_engine(params), order.sample(NAMES + others, len(NAMES) + len(others)))
    assert_same(plain, mixed)
    alone = NAMES[5]
    assert_same({alone: plain[alone]}, play_all(make_engine(params), [alone]))


def test_promise_2_concurrency_and_cuts_into_rounds_change_nothing(params, plain):
    few_pages = play_all(make_engine(params, pages=45), NAMES)  # at most two or three sequences at once
    assert_same(plain, few_pages)
    assert_same(plain, play_all(make_engine(params, round_steps=7), NAMES))


def test_promise_2_slots_change_tokens_through_near_ties_only(params, plain):
    other = play_all(make_engine(params, slots=3), NAMES)
    differing = 0
    for name, played in plain.items():
        count = min(len(played.ids), len(other[name].ids))
        same = played.ids[:count] == other[name].ids[:count]
        until = count if same.all() else int(np.argmin(same))
        differing += not same.all()
        np.testing.assert_allclose(played.logprobs[:until], other[name].logprobs[:until], atol=1e-5)
    assert differing / len(plain) <= 1 / 16


def test_preemption_changes_no_token(params, plain):
    engine = make_engine(params, pages=46, reserve_quantile=0.1)
    engine._scheduler._recent.extend([1] * 20)
    preempted = play_all(engine, NAMES, pause=lambda: 0.001)
    assert engine.stats()["preemptions"] > 3
    for name, played in plain.items():
        np.testing.assert_array_equal(played.ids, preempted[name].ids)
        np.testing.assert_allclose(played.logprobs, preempted[name].logprobs, atol=1e-5)
    assert engine.stats()["pages_used"] == 0


def test_draws_samples_and_seeds_sample_differently(params, plain):
    texts = [tuple(played.samples[0].ids) for played in plain.values()]
    assert len(set(texts)) > len(texts) // 2

    async def first(engine, draw, sample):
        async with engine.serving():
            sequence = await engine.open(prompt_of(0), draw=draw, sample=sample, max_tokens=40)
            return tuple((await sequence.generate(40)).ids)

    def sampled(seed, draw, sample):
        return asyncio.run(first(make_engine(params, stops=(), seed=seed), draw, sample))

    results = [sampled(1, 0, 0), sampled(1, 1, 0), sampled(1, 0, 1), sampled(2, 0, 0)]
    assert len(set(results)) == 4
    assert sampled(1, 0, 0) == results[0]


def test_greedy_is_the_arg_max_of_the_trainers_path(params):
    played = play_all(make_engine(params, stops=()), [(0, 0), (0, 1)], temperature=0.0)
    np.testing.assert_array_equal(played[0, 0].samples[0].ids, played[0, 1].samples[0].ids)
    one = played[0, 0]
    logprobs, best = scored(params, one, 1.0)
    np.testing.assert_array_equal(best[one.mask == 1], one.ids[one.mask == 1])
    np.testing.assert_allclose(one.logprobs[one.mask == 1], logprobs[one.mask == 1], atol=1e-5)


def test_a_generation_ends_at_a_stop_id_or_at_its_limit(params, plain):
    samples = [sample for played in plain.values() for sample in played.samples]
    assert any(sample.stopped for sample in samples) and any(not sample.stopped for sample in samples)
    for sample in samples:
        assert not set(sample.ids[:-1]) & set(STOPS)
        assert sample.stopped == (sample.ids[-1] in STOPS)
        assert sample.stopped or len(sample.ids) == 10
        assert len(sample.ids) == len(sample.logprobs) == len(sample.versions)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_promise_11_serving_compiles_nothing(params, kv_dtype):
    engine = make_engine(params, slots=5, kv_dtype=kv_dtype)  # a shape of its own
    engine.compile()
    compiled = []
    listener = lambda name, seconds, **_: compiled.append(name) if "compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    functions = (rounds.decode_round, rounds.prefill, rounds.copy_pages)
    sizes = [function._cache_size() for function in functions]
    try:
        play_all(engine, NAMES[:7], pause=lambda: 0.001)
        engine.set_weights(jax.tree.map(lambda leaf: leaf + 0, params), 1)
        compiled_by_adding = len(compiled)
        play_all(engine, NAMES[:7])
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert [function._cache_size() for function in functions] == sizes
    assert len(compiled) == compiled_by_adding


def test_tokens_carry_the_weights_that_sampled_them_and_running_sequences_go_on(params):
    engine = make_engine(params, stops=())
    changed = jax.tree.map(lambda leaf: leaf * 1.3, params)

    async def run():
        async with engine.serving():
            sequence = await engine.open(prompt_of(1), draw=1, sample=0, max_tokens=56)
            before = await sequence.generate(10)
            engine.set_weights(changed, 7)
            after = await sequence.generate(10)
            fresh = await engine.open(prompt_of(1), draw=1, sample=0, max_tokens=56)
            return before, after, await fresh.generate(10)

    before, after, fresh = asyncio.run(run())
    assert set(before.versions) == {0} and set(after.versions) == set(fresh.versions) == {7}
    clean = play_all(make_engine(changed, stops=(), version=7), [(1, 0)])[1, 0].samples[0]
    np.testing.assert_array_equal(clean.ids, fresh.ids)
    np.testing.assert_array_equal(clean.logprobs, fresh.logprobs)


def test_weights_change_between_rounds_of_a_running_generation(params):
    engine = make_engine(params, stops=(), round_steps=2)

    async def run():
        async with engine.serving():
            sequence = await engine.open(prompt_of(1), draw=1, sample=0, max_tokens=56)
            running = asyncio.create_task(sequence.generate(56))
            while engine.stats()["rounds"] < 3:
                await asyncio.sleep(0.001)
            engine.set_weights(params, 1)
            return await running

    versions = asyncio.run(run()).versions
    assert versions[0] == 0 and versions[-1] == 1 and (np.diff(versions) >= 0).all()
    assert np.argmax(versions) % 2 == 0


def test_wrong_weights_are_refused(params):
    engine = make_engine(params)
    with pytest.raises(ValueError, match="other names, shapes or types"):
        engine.set_weights(jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params), 1)


def test_a_slot_that_waits_for_a_tool_blocks_nobody(params):
    engine = make_engine(params, slots=3, stops=())  # room for four times as many in the pages

    async def run():
        async with engine.serving():
            slow = [await engine.open([draw], draw=draw, sample=0, max_tokens=16) for draw in range(3)]
            await asyncio.gather(*(sequence.generate(5) for sequence in slow))
            quick = await asyncio.wait_for(engine.open([9], draw=9, sample=0, max_tokens=16), 60)
            await asyncio.wait_for(quick.generate(16), 60)
            assert engine.stats()["pages_used"] > 4 + 1
            for sequence in slow:
                sequence.append([30, 31])
            return await asyncio.gather(*(sequence.generate(5) for sequence in slow))

    assert [len(sample.ids) for sample in asyncio.run(run())] == [5, 5, 5]


def test_the_seconds_of_a_sample_are_those_of_its_own_rounds(params):
    engine = make_engine(params, slots=1, stops=())

    async def run():
        async with engine.serving():
            sequences = [await engine.open([draw], draw=draw, sample=0, max_tokens=16) for draw in range(3)]
            started = time.perf_counter()
            samples = await asyncio.gather(*(sequence.generate(16) for sequence in sequences))
            return [sample.seconds for sample in samples], time.perf_counter() - started

    seconds, elapsed = asyncio.run(run())
    assert min(seconds) > 0
    assert sum(seconds) <= elapsed  # they had the one slot in turn; waiting for it would count twice


def test_limits_are_checked_before_anything_is_queued(params):
    engine = make_engine(params, stops=())

    async def run():
        async with engine.serving():
            with pytest.raises(PromptTooLong, match=r"max_prompt_tokens=24 .* has 25 tokens; raise EngineConfig"):
                await engine.open(np.ones(25, np.int32), draw=0, sample=0, max_tokens=5)
            with pytest.raises(ValueError, match="max_tokens=57 is outside"):
                await engine.open([1], draw=0, sample=0, max_tokens=57)
            with pytest.raises(ValueError, match="empty"):
                await engine.open([], draw=0, sample=0, max_tokens=5)
            with pytest.raises(ValueError, match="temperature=-1"):
                await engine.open([1], draw=0, sample=0, max_tokens=5, temperature=-1)
            assert engine.stats()["pages_used"] == engine.stats()["admitted"] == engine.stats()["queued"] == 0
            sequence = await engine.open(prompt_of(0), draw=0, sample=0, max_tokens=12)
            assert len((await sequence.generate(8)).ids) == 8 and sequence.remaining == 4
            with pytest.raises(ValueError, match="5 tokens to append but 4 of max_tokens=12"):
                sequence.append([1] * 5)
            assert len((await sequence.generate(100)).ids) == 4
            with pytest.raises(ValueError, match="nothing can be sampled"):
                await sequence.generate(1)
            sequence.close()
            sequence.close()
            with pytest.raises(ValueError, match="closed"):
                await sequence.generate(1)
            assert engine.stats()["pages_used"] == 0

    asyncio.run(run())


def test_a_fault_of_the_device_reaches_everybody_who_waits(params, monkeypatch):
    engine = make_engine(params, pages=46)

    def fail(*_, **__):
        raise MemoryError("no more")

    async def run():
        async with engine.serving():
            monkeypatch.setattr(rounds, "decode_round", fail)
            waiting = [asyncio.create_task(play(engine, draw, 0)) for draw in range(4)]
            ended = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 60)
            assert all(isinstance(error, EngineFailure) for error in ended)
            assert all(isinstance(error.__cause__, MemoryError) for error in ended)
            with pytest.raises(EngineFailure, match="no more"):
                await engine.open([1], draw=0, sample=0, max_tokens=5)
        assert engine.stats()["pages_used"] == 0

    asyncio.run(run())


def test_leaving_ends_whoever_still_waits(params):
    engine = make_engine(params, stops=(), pages=46)

    async def run():
        async with engine.serving():
            waiting = [asyncio.create_task(play(engine, draw, 0)) for draw in range(3)]
            await asyncio.sleep(0.01)
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert any(isinstance(error, EngineFailure) for error in ended)
        with pytest.raises(EngineFailure, match="not serving"):
            await engine.open([1], draw=0, sample=0, max_tokens=5)
        assert engine.stats()["pages_used"] == 0

    asyncio.run(run())


def test_cancelling_frees_slots_pages_and_queue(params):
    engine = make_engine(params, stops=(), pages=46)

    async def run():
        async with engine.serving():
            tasks = [asyncio.create_task(play(engine, draw, 0)) for draw in range(4)]
            while not engine.stats()["rounds"]:
                await asyncio.sleep(0.001)
            assert engine.stats()["queued"]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            stats = engine.stats()
            assert stats["pages_used"] == stats["queued"] == stats["admitted"] == 0
            sequence = await engine.open(prompt_of(0), draw=0, sample=0, max_tokens=56)
            generating = asyncio.create_task(sequence.generate(56))
            await asyncio.sleep(0.001)
            generating.cancel()
            await asyncio.wait([generating])
            assert engine.stats()["pages_used"] == engine.stats()["admitted"] == 0, "not closed by anybody else"
            assert len((await play(engine, 9, 0)).ids)

    asyncio.run(run())


def test_the_loop_is_free_while_the_device_works(params, monkeypatch):
    engine = make_engine(params, stops=())
    engine.compile()
    read = rounds.read_round

    def slow(output):
        time.sleep(0.2)
        return read(output)

    monkeypatch.setattr(rounds, "read_round", slow)

    async def run():
        async with engine.serving():
            task = asyncio.create_task(play(engine, 0, 0))
            turns = 0
            while not task.done():
                await asyncio.sleep(0.005)
                turns += 1
            return turns

    assert asyncio.run(run()) > 50


def test_accounts_return_to_zero_after_everything_closed(params, plain):
    engine = make_engine(params)
    play_all(engine, NAMES, pause=lambda: random.choice([None, 0.001]))
    stats = engine.stats()
    assert stats["pages_used"] == stats["queued"] == stats["admitted"] == 0
    assert stats["decode_tokens"] == sum(played.mask.sum() for played in plain.values())
    assert 0 < stats["occupancy"] <= 1 and 0 <= stats["idle_share"] <= 1
    assert stats["opened"] == len(NAMES) and stats["prefill_calls"] and stats["rounds"]
    prompts = sum(len(prompt_of(draw)) - 1 for draw in range(4))
    tools = sum((1 - played.mask).sum() for played in plain.values())
    assert stats["prefill_tokens"] == prompts + tools, "a prompt is prefilled once; later tool output alone"
