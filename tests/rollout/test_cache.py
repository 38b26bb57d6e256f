"""Pages are counted right, whoever shares them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.rollout.cache import OutOfPages, PageAllocator, PromptCache, pages_for


def test_a_page_is_free_when_its_last_holder_leaves():
    allocator = PageAllocator(3)
    pages = allocator.take(2)
    allocator.share(pages[:1])
    allocator.release(pages)
    assert allocator.holders(pages[0]) == 1 and allocator.used == 1
    allocator.release(pages[:1])
    assert allocator.free == 3


def test_taking_too_many_takes_nothing():
    allocator = PageAllocator(3)
    allocator.take(1)
    with pytest.raises(OutOfPages, match="3 KV pages asked for but 2 of 3 are free"):
        allocator.take(3)
    assert allocator.free == 2


def test_free_pages_can_neither_be_shared_nor_released():
    allocator = PageAllocator(2)
    with pytest.raises(ValueError, match="is free"):
        allocator.share([0])
    with pytest.raises(ValueError, match="nobody holds"):
        allocator.release([0])


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 5)), max_size=60))
def test_pages_are_never_handed_out_twice(steps):
    allocator, holds = PageAllocator(12), []
    for action, count in steps:
        if action == "take" and count <= allocator.free:
            pages = allocator.take(count)
            assert not set(pages) & {page for held in holds for page in held}
            holds.append(pages)
        elif action == "share" and holds:
            holds.append(list(holds[count % len(holds)]))
            allocator.share(holds[-1])
        elif action == "release" and holds:
            allocator.release(holds.pop(count % len(holds)))
        assert allocator.used == len({page for held in holds for page in held})
    for held in holds:
        allocator.release(held)
    assert allocator.used == 0


def test_a_prompt_takes_its_pages_once_and_full_ones_outlive_the_entry():
    allocator = PageAllocator(10)
    cache = PromptCache(allocator, page_size=4)
    ids = np.arange(11, dtype=np.int32)  # 10 to prefill: two full pages and a tail
    first, second = (cache.attach(ids, b"k") for _ in range(2))
    assert first is second and allocator.used == 3 and first.tail == first.pages[2]
    cache.detach(first, keep=False)
    first.filled = True
    cache.forget_filled()
    assert allocator.used == 2 and b"k" not in cache
    fresh = cache.attach(ids, b"k")
    assert fresh is not first and allocator.used == 5
    cache.detach(second, keep=False)
    assert allocator.used == 3 and b"k" in cache, "leaving an old entry must not take the new one away"
    cache.detach(fresh, keep=True)
    assert cache.idle_pages() == 3
    cache.reclaim(but=b"k")
    assert allocator.used == 3
    cache.reclaim()
    assert allocator.used == 0


@pytest.mark.parametrize(("tokens", "pages", "has_tail"), [(1, 0, False), (2, 1, True), (5, 1, False), (6, 2, True)])
def test_the_last_prompt_token_is_left_to_decoding(tokens, pages, has_tail):
    allocator = PageAllocator(4)
    prompt = PromptCache(allocator, page_size=4).attach(np.zeros(tokens, np.int32), b"k")
    assert allocator.used == pages == pages_for(tokens - 1, 4)
    assert (prompt.tail is not None) is has_tail
