"""The warden's event loop on real descriptors."""

import os

from jaxrl.sandbox.loop import Loop


def test_news_of_a_closed_descriptor_is_not_for_the_next_one_of_its_number() -> None:
    """Both pipes have news at once; whichever is heard first replaces the other by a pipe that has none."""
    loop = Loop()
    readers, writers = zip(*(os.pipe() for _ in range(2)), strict=True)
    heard: list[int] = []
    replaced: list[int] = []

    def replace_other(other: int) -> None:
        heard.append(other)
        loop.forget(other)
        spare, writer = os.pipe()
        os.dup2(spare, other)
        os.close(spare)
        replaced.append(writer)
        loop.watch(other, lambda _: heard.append(-1))
        loop.afterwards(loop.stop)

    for reader, other in zip(readers, reversed(readers), strict=True):
        loop.watch(reader, lambda _, other=other: replace_other(other))
    for writer in writers:
        os.write(writer, b"x")
    loop.run()
    for descriptor in (*readers, *writers, *replaced):
        os.close(descriptor)
    assert len(heard) == 1 and heard[0] in readers, "nobody has written to the pipe that took the place"


def test_a_watcher_that_came_within_the_round_hears_its_own_news() -> None:
    loop = Loop()
    reader, writer = os.pipe()
    heard: list[int] = []

    def second(_: int) -> None:
        heard.append(os.read(reader, 8)[0])
        loop.stop()

    loop.watch(reader, lambda _: loop.watch(reader, second))
    os.write(writer, b"x")
    loop.run()
    for descriptor in (reader, writer):
        os.close(descriptor)
    assert heard == [ord("x")]
