"""What was built is kept by what it was built from, as far as there is room; nobody waits for one who has left."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from jaxrl.sandbox.builds import Builds


class Workshop:
    """Counts what is built; a text of n letters weighs n, and one that begins with "no" is not to be kept."""

    def __init__(self, room: int) -> None:
        self.builds: Builds[str] = Builds(room, lambda text: None if text.startswith("no") else len(text))
        self.made: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def get(self, text: str) -> str:
        return await self.builds.get(text, self._maker(text))

    def _maker(self, text: str) -> Callable[[], Awaitable[str]]:
        async def make() -> str:
            self.made.append(text)
            await self.gate.wait()
            if text == "broken":
                raise OSError(text)
            return text

        return make


async def _least_recently_used_goes() -> list[str]:
    shop = Workshop(room=6)
    for text in ("aa", "bb", "cc", "aa", "dd", "aa", "cc", "bb"):
        assert await shop.get(text) == text
    return shop.made


def test_what_was_used_longest_ago_goes_first() -> None:
    assert asyncio.run(_least_recently_used_goes()) == ["aa", "bb", "cc", "dd", "bb"]


def test_what_is_too_large_or_not_to_be_kept_is_built_each_time() -> None:
    async def run() -> list[str]:
        shop = Workshop(room=3)
        for text in ("abcd", "abcd", "no", "no", "a", "a"):
            await shop.get(text)
        return shop.made

    assert asyncio.run(run()) == ["abcd", "abcd", "no", "no", "a"]


def test_callers_at_once_wait_for_one_build() -> None:
    async def run() -> list[str]:
        shop = Workshop(room=9)
        assert await asyncio.gather(*(shop.get(text) for text in ("a", "a", "b", "a"))) == ["a", "a", "b", "a"]
        return shop.made

    assert asyncio.run(run()) == ["a", "b"]


def test_one_who_leaves_lets_the_next_build() -> None:
    async def run() -> list[str]:
        shop = Workshop(room=9)
        shop.gate.clear()
        first, second = (asyncio.create_task(shop.get("a")) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        shop.gate.set()
        assert await second == "a"
        return shop.made

    assert asyncio.run(run()) == ["a", "a"]


def test_a_build_that_raises_reaches_its_callers_and_is_not_kept() -> None:
    async def run() -> list[str]:
        shop = Workshop(room=9)
        answers = await asyncio.gather(shop.get("broken"), shop.get("broken"), return_exceptions=True)
        assert [type(answer) for answer in answers] == [OSError, OSError]
        return shop.made

    assert asyncio.run(run()) == ["broken", "broken"]
