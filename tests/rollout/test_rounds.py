"""The device functions, against themselves cut differently."""

import jax
import numpy as np
import pytest

from jaxrl.model.kv_pages import KVPages, init_pages
from jaxrl.rollout import rounds
from jaxrl.rollout.scheduler import Scheduler
from tests.rollout.conftest import CONFIG, MODEL

WIDTH = Scheduler(CONFIG).table_width
PAGES = Scheduler(CONFIG).total_pages
CHUNK = CONFIG.prefill_chunk
TOKENS = np.random.default_rng(0).integers(20, MODEL.vocab_size, 3 * CHUNK - 3).astype(np.int32)


def prefilled(params, calls) -> KVPages:
    """Pages after calls, each a list of (first token, past the last) of one sequence in pages 0, 1, ..."""
    kv_pages = init_pages(MODEL, PAGES, CONFIG.page_size)
    for chunks in calls:
        plan = np.zeros((CONFIG.prefill_rows, rounds.ROW_TABLE + WIDTH + CHUNK), np.int32)
        plan[:, rounds.ROW_TABLE : rounds.ROW_TABLE + WIDTH] = np.arange(WIDTH)
        for row, (start, end) in zip(plan, chunks, strict=False):
            row[rounds.START], row[rounds.COUNT] = start, end - start
            row[len(row) - CHUNK : len(row) - CHUNK + end - start] = TOKENS[start:end]
        kv_pages = rounds.prefill(params, kv_pages, plan, model=MODEL, chunk=CHUNK)
    return jax.tree.map(np.asarray, kv_pages)


def decode_plan(left) -> np.ndarray:
    plan = np.zeros((CONFIG.slots, rounds.TABLE + WIDTH), np.int32)
    plan[:, rounds.LEFT] = left
    plan[:, rounds.PROMPT] = 1
    plan[:, rounds.TOKEN] = plan[:, rounds.DRAW] = 20 + np.arange(CONFIG.slots)
    plan[:, rounds.TEMPERATURE] = np.float32(1).view(np.int32)
    plan[:, rounds.TABLE : rounds.TABLE + 2] = np.arange(2 * CONFIG.slots).reshape(-1, 2)
    return plan


def decoded(params, left, exit_at=0, stops=(-1,) * 4):
    return rounds.read_round(decode(params, left, exit_at, stops)[1])


def decode(params, left, exit_at=0, stops=(-1,) * 4):
    return rounds.decode_round(
        params,
        init_pages(MODEL, PAGES, CONFIG.page_size),
        decode_plan(left),
        np.int32(exit_at),
        jax.random.key(3),
        np.array(stops, np.int32),
        model=MODEL,
        steps=CONFIG.round_steps,
    )


def test_successive_chunks_of_a_sequence_may_share_a_call(params):
    cuts = [(0, CHUNK), (CHUNK, 2 * CHUNK), (2 * CHUNK, 3 * CHUNK - 3)]
    together = prefilled(params, [cuts[:2], cuts[2:]])
    apart = prefilled(params, [[cut] for cut in cuts])
    jax.tree.map(np.testing.assert_array_equal, together, apart)
    assert (apart.keys[:, 5, :, :1] != 0).all() and (apart.keys[:, 5, :, 1:] == 0).all(), (
        "21 tokens, and nothing beyond"
    )


def test_copies_take_whole_pages_and_skip_what_is_no_page(params):
    before = prefilled(params, [[(0, CHUNK)]])
    plan = np.full((2, CONFIG.slots), PAGES, np.int32)
    plan[0] = 0
    plan[:, 0] = 1, 7
    after = rounds.copy_pages(jax.tree.map(jax.numpy.asarray, before), plan)
    expected = before.keys.copy()
    expected[:, 7] = expected[:, 1]
    np.testing.assert_array_equal(after.keys, expected)


@pytest.mark.parametrize("exit_at", [0, 6, 7])
def test_a_round_ends_when_too_few_slots_go_on(params, exit_at):
    left = np.array([1, 2, 9, 9, 9, 9, 9, 9])
    tokens, _ = decoded(params, left, exit_at)
    steps = {0: 4, 6: 2, 7: 1}[exit_at]
    np.testing.assert_array_equal((tokens >= 0).sum(axis=0), np.minimum(left, steps))


def test_empty_slots_sample_nothing_and_change_nothing(params):
    tokens, logprobs = decoded(params, np.array([4] * 8))
    kv_pages, output = decode(params, np.array([4, 0, 0, 4, 0, 0, 0, 4]))
    some, their_logprobs = rounds.read_round(output)
    written = np.flatnonzero((np.asarray(kv_pages.keys) != 0).any(axis=(0, 2, 3, 4)))
    assert written.tolist() == [0, 6, 14]
    assert (some[:, [1, 2, 4, 5, 6]] == -1).all()
    np.testing.assert_array_equal(some[:, [0, 3, 7]], tokens[:, [0, 3, 7]])
    np.testing.assert_array_equal(their_logprobs[:, [0, 3, 7]], logprobs[:, [0, 3, 7]])


def test_a_stop_id_ends_its_slot_only(params):
    tokens, _ = decoded(params, np.array([4] * 8))
    stop = int(tokens[1, 2])
    stopped, _ = decoded(params, np.array([4] * 8), stops=(stop, -1, -1, -1))
    for slot in range(CONFIG.slots):
        hits = np.flatnonzero(tokens[:, slot] == stop)
        count = hits[0] + 1 if len(hits) else 4
        np.testing.assert_array_equal(stopped[:count, slot], tokens[:count, slot])
        assert (stopped[count:, slot] == -1).all()
