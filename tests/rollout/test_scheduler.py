"""Admission, slots, pages and preemption, without a device."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.config import ConfigError, EngineConfig
from jaxrl.rollout import rounds
from jaxrl.rollout.scheduler import ENOUGH_LENGTHS, Scheduler, Track

CONFIG = EngineConfig(
    slots=3, page_size=4, round_steps=4, prefill_rows=2, prefill_chunk=8, max_prompt_tokens=12, max_response_tokens=20
)
FULL = 8 + 1  # pages of a longest sequence: 32 tokens and the prompt's tail


def track(ticket, prompt=(1, 2, 3, 4, 5, 6), max_tokens=20, draw=0, sample=0):
    ids = np.array(prompt, np.int32)
    return Track(ticket, ids, draw, sample, max_tokens, 1.0, ids.tobytes(), ids.tolist())


def config(**changes):
    return EngineConfig(**{**CONFIG.__dict__, **changes})


def advance(scheduler, stop=lambda track: False):
    """Plan and pretend that every slot sampled what it may; returns the cycle."""
    scheduler.admit()
    cycle = scheduler.plan()
    if cycle is not None:
        check_plan(scheduler, cycle)
        for running in scheduler.decoding:
            count = min(int(cycle.decode[running.slot, rounds.LEFT]), scheduler.config.round_steps)
            scheduler.commit(running, [7] * count, stop(running))
    return cycle


def check_plan(scheduler, cycle):
    """Every sequence that decodes has its own pages for everything the round writes."""
    size, writable = scheduler.config.page_size, []
    for running in scheduler.decoding:
        row = cycle.decode[running.slot]
        assert row[rounds.TOKEN] == running.tokens[-1] and row[rounds.POSITION] == len(running.tokens) - 1
        steps = min(int(row[rounds.LEFT]), scheduler.config.round_steps)
        assert steps > 0
        first, last = row[rounds.POSITION] // size, (row[rounds.POSITION] + steps - 1) // size
        pages = row[rounds.TABLE + first : rounds.TABLE + last + 1].tolist()
        assert all(scheduler.allocator.holders(page) == 1 for page in pages)
        writable += pages
    assert len(set(writable)) == len(writable)


def test_a_group_prefills_its_prompt_once_and_shares_its_full_pages():
    scheduler = Scheduler(CONFIG)
    tracks = [track(ticket, range(1, 11), sample=ticket) for ticket in range(3)]  # 9 prefilled: 2 full pages and a tail
    for one in tracks:
        scheduler.submit(one)
    assert scheduler.admit() == tracks
    for one in tracks:
        scheduler.generate(one, 4)
    cycle = scheduler.plan()
    assert cycle.prefill_tokens == 9 and len(cycle.prompts) == 1 and not cycle.texts
    tables = cycle.decode[:, rounds.TABLE :]
    assert (tables[:, :2] == tables[0, :2]).all() and len(set(tables[:, 2])) == 3
    copies = cycle.copies[0]
    assert copies[1].tolist() == tables[:, 2].tolist()
    assert (copies[0] == tracks[0].shared.tail).all()
    np.testing.assert_array_equal(cycle.prompts[0][:, rounds.START], [0, 8])
    np.testing.assert_array_equal(cycle.prompts[0][:, rounds.COUNT], [8, 1])


def test_a_resumed_sequence_prefills_only_what_was_appended():
    scheduler = Scheduler(CONFIG)
    one = track(0)
    scheduler.submit(one)
    scheduler.admit()
    scheduler.generate(one, 4)
    advance(scheduler)
    assert one.slot == -1 and one.pages, "a sequence that waits keeps its pages but no slot"
    scheduler.append(one, [8, 9, 10])
    scheduler.generate(one, 4)
    cycle = scheduler.plan()
    assert not cycle.prompts and not cycle.copies
    row = cycle.texts[0][0]
    assert (row[rounds.START], row[rounds.COUNT]) == (9, 3)
    assert row[-8:-5].tolist() == [7, 8, 9] and cycle.decode[one.slot, rounds.TOKEN] == 10


def test_first_come_first_served_even_when_a_later_one_would_fit():
    scheduler = Scheduler(config(pages=FULL + 3))
    tracks = [track(0, max_tokens=20), track(1, range(12)), track(2, [1], max_tokens=1)]
    for one in tracks:
        scheduler.submit(one)
    assert scheduler.admit() == tracks[:1]
    scheduler.close(tracks[0])
    assert scheduler.admit() == tracks[1:]


def test_those_that_leave_the_queue_hold_up_nobody():
    scheduler = Scheduler(config(pages=FULL + 1))
    first, gone, also_gone, last = (track(ticket, (ticket + 1,)) for ticket in range(4))
    for one in (first, gone, also_gone, last):
        scheduler.submit(one)
    assert scheduler.admit() == [first]
    for one in (gone, first, also_gone):
        scheduler.close(one)
    assert scheduler.admit() == [last] and scheduler.queued == 0


def test_with_a_full_reserve_nothing_is_preempted():
    scheduler = Scheduler(config(pages=2 * FULL))
    tracks = [track(ticket, draw=ticket, prompt=range(ticket, ticket + 12)) for ticket in range(5)]
    for one in tracks:
        scheduler.submit(one)
        one.goal = one.max_tokens
    while any(not one.closed for one in tracks):
        advance(scheduler)
        for one in tracks:
            if one.response_tokens == one.max_tokens:
                scheduler.close(one)
    assert scheduler.preemptions == 0 and scheduler.allocator.used == 0


def test_an_underestimate_preempts_the_youngest_and_everybody_ends():
    scheduler = Scheduler(config(pages=2 * FULL, reserve_quantile=0.5))
    for ticket in range(ENOUGH_LENGTHS):  # short responses at first
        short = track(ticket)
        scheduler.submit(short)
        scheduler.admit()
        scheduler.append(short, [1])
        scheduler.close(short)
    tracks = [track(100 + n, prompt=range(n, n + 12)) for n in range(4)]
    for one in tracks:
        scheduler.submit(one)
    admitted = scheduler.admit()
    assert len(admitted) > 2, "a small reserve admits more than two longest sequences"
    for one in admitted:
        scheduler.generate(one, one.max_tokens)
    ended = []
    for _ in range(100):
        advance(scheduler)
        for one in tracks:
            if one.admitted and not one.generating and not one.closed:
                if one.response_tokens == one.max_tokens:
                    scheduler.close(one)
                    ended.append(one)
                else:
                    scheduler.generate(one, one.max_tokens - one.response_tokens)
    assert scheduler.preemptions > 0 and len(ended) == 4
    assert ended[0] is tracks[0], "the oldest is never preempted"
    assert scheduler.allocator.used == 0


def test_new_weights_are_not_mixed_with_prompts_of_older_ones():
    scheduler = Scheduler(CONFIG)
    running, fresh, later = (track(ticket, range(1, 11), sample=ticket) for ticket in range(3))
    for one in (running, fresh):
        scheduler.submit(one)
    scheduler.admit()
    scheduler.generate(running, 8)
    advance(scheduler)
    old = running.shared.pages[:2]
    scheduler.weights_changed()
    assert not fresh.admitted and running.admitted
    scheduler.submit(later)
    scheduler.generate(fresh, 4)
    assert scheduler.admit() == [fresh, later]
    cycle = scheduler.plan()
    assert cycle.prefill_tokens == 9, "the prompt is prefilled again"
    assert fresh.shared is later.shared and not set(fresh.shared.pages) & set(old)
    assert scheduler._table(running)[:2] == old, "who has begun goes on with what it has"
    for one in (running, fresh, later):
        scheduler.close(one)
    assert scheduler.allocator.used == 0


def test_a_prompt_waits_for_queued_samples_of_its_group_but_not_at_others_expense():
    scheduler = Scheduler(config(pages=FULL + 2))
    first, second = track(0, range(12), sample=0), track(1, range(12), sample=1)
    for one in (first, second):
        scheduler.submit(one)
    assert scheduler.admit() == [first]
    scheduler.close(first)
    assert scheduler.allocator.used == 3, "kept for the second sample"
    scheduler.close(second)
    assert scheduler.allocator.used == 0
    first, second, other = track(2, range(12)), track(3, range(12)), track(1, range(50, 62))
    for one in (first, second):
        scheduler.submit(one)
    scheduler.admit()
    scheduler.close(first)
    scheduler.submit(other)  # older, so it is served first
    assert scheduler.admit() == [other]


def test_rounds_end_early_only_while_somebody_waits_for_a_slot():
    scheduler = Scheduler(CONFIG)
    tracks = [track(ticket, sample=ticket) for ticket in range(4)]
    for one in tracks:
        scheduler.submit(one)
    scheduler.admit()
    for one in tracks[:3]:
        scheduler.generate(one, 20)
    assert advance(scheduler).exit_at == 0
    scheduler.generate(tracks[3], 20)
    assert advance(scheduler).exit_at == 2


def test_pages_that_cannot_hold_one_sequence_are_refused():
    with pytest.raises(ConfigError, match=r"EngineConfig.pages=8 .* max_prompt_tokens=12 .* give at least 9 pages"):
        Scheduler(config(pages=8))
    Scheduler(config(page_size=128))
    with pytest.raises(ConfigError, match=r"EngineConfig.page_size=129 .* longest sequence .* make it at most 128"):
        Scheduler(config(page_size=129))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_accounts_return_to_zero_whatever_happens(data):
    scheduler = Scheduler(
        config(
            pages=data.draw(st.sampled_from([0, FULL, FULL + 3, 3 * FULL]), "pages"),
            reserve_quantile=data.draw(st.sampled_from([0.3, 1.0]), "quantile"),
        )
    )
    scheduler._recent.extend([1] * ENOUGH_LENGTHS)
    prompts = [tuple(range(start, start + length)) for start, length in ((0, 1), (1, 5), (2, 12), (3, 9))]
    live, ticket = [], 0
    for action in data.draw(st.lists(st.sampled_from("ooogggggaaacccrrrrrrw"), max_size=60), "actions"):
        if action == "o":
            live.append(track(ticket, data.draw(st.sampled_from(prompts)), data.draw(st.integers(1, 20))))
            scheduler.submit(live[-1])
            ticket += 1
        elif action == "r":
            advance(scheduler, stop=lambda running: (len(running.tokens) + running.ticket) % 5 == 0)
        elif action == "w":
            scheduler.weights_changed()
        elif live:
            one = data.draw(st.sampled_from(live))
            left = one.max_tokens - one.response_tokens
            opened = one.admitted or one.response_tokens
            if action == "c":
                scheduler.close(one)
                live.remove(one)
            elif action == "g" and opened and not one.generating and left and one.ticket not in scheduler._queue:
                scheduler.generate(one, data.draw(st.integers(1, left)))
            elif action == "a" and opened and not one.generating:
                scheduler.append(one, [9] * data.draw(st.integers(0, left)))
        scheduler.admit()
        assert 0 <= scheduler._reserved == sum(one.reserved for one in live)
        if scheduler.config.reserve_quantile == 1.0:
            assert scheduler._reserved <= scheduler.allocator.free and scheduler.preemptions == 0
        held = {page for one in live for page in one.pages}
        assert len(held) == sum(len(one.pages) for one in live)
        assert all(scheduler.allocator.holders(page) == 1 for page in held)
    for one in live:
        if one.generating and not one.admitted:
            assert one.ticket in scheduler._queue, "who generates is admitted or asks to be"
        scheduler.close(one)
        scheduler.close(one)
    assert scheduler.allocator.used == 0 and scheduler._reserved == 0
    assert not scheduler._queue and not scheduler._queued_keys and not scheduler.decoding and not len(scheduler.prompts)
