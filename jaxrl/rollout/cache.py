"""Whose KV pages are whose: a reference-counted allocator on the host, and prompts that a group shares.

A prompt of n tokens is prefilled once, all but its last token (decoding consumes that one). The pages it fills
completely are shared by every sample of the group; the last, partly filled one is the prompt's *tail*, which every
sample copies into a page of its own before it writes there. A copy moves bits unchanged and has one compiled shape,
so results are the same whether a prompt was prefilled for this sample or for another; prefilling the tail anew for
every sample would cost a chunk each.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np


class OutOfPages(RuntimeError):
    """More KV pages were asked for than are free."""


class PageAllocator:
    """Page numbers 0 ... pages - 1, each with the number of its holders."""

    def __init__(self, pages: int) -> None:
        self._holders = [0] * pages
        self._free = list(range(pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages somebody holds."""
        return len(self._holders) - len(self._free)

    def holders(self, page: int) -> int:
        """How many hold this page."""
        return self._holders[page]

    def take(self, count: int) -> list[int]:
        """``count`` free pages, each with one holder now.

        Raises:
            OutOfPages: fewer are free; nothing is taken.
        """
        if count > len(self._free):
            raise OutOfPages(f"{count} KV pages asked for but {len(self._free)} of {len(self._holders)} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each page."""
        for page in pages:
            if not self._holders[page]:
                raise ValueError(f"KV page {page} is free and cannot be shared")
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder fewer for each page; without holders it is free."""
        for page in pages:
            if not self._holders[page]:
                raise ValueError(f"KV page {page} is released but nobody holds it")
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold this many tokens."""
    return -(-tokens // page_size)


@dataclasses.dataclass(eq=False)
class SharedPrompt:
    """A prompt's KV pages, all tokens but the last.

    Attributes:
        key: the prompt's ids as bytes.
        ids: [n - 1] int32, what is prefilled.
        pages: the pages that hold it; the last one is the tail unless it is full.
        full: how many of them are full, and shared.
        users: sequences that are attached to it.
        filled: whether the prefill was done (or is in the cycle being planned).
    """

    key: bytes
    ids: np.ndarray
    pages: list[int]
    full: int
    users: int = 0
    filled: bool = False

    @property
    def tail(self) -> int | None:
        """The partly filled page."""
        return self.pages[-1] if len(self.pages) > self.full else None


class PromptCache:
    """Prompts whose pages can be shared, under the weights in use.

    A prompt holds its pages as long as it is in the cache; every attached sequence holds the full ones as well, so
    they outlive the entry.
    """

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        self._allocator = allocator
        self._page_size = page_size
        self._prompts: dict[bytes, SharedPrompt] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, key: bytes) -> bool:
        return key in self._prompts

    def attach(self, ids: np.ndarray, key: bytes) -> SharedPrompt:
        """The shared prompt with these ids, made if it is not there, with one user more.

        Raises:
            OutOfPages: it has to be made and its pages are not free.
        """
        prompt = self._prompts.get(key)
        if prompt is None:
            count = len(ids) - 1
            pages = self._allocator.take(pages_for(count, self._page_size))
            prompt = SharedPrompt(key, ids[:-1], pages, count // self._page_size)
            self._prompts[key] = prompt
        prompt.users += 1
        self._allocator.share(prompt.pages[: prompt.full])
        return prompt

    def detach(self, prompt: SharedPrompt, *, keep: bool) -> None:
        """One user fewer; the last one takes the prompt out of the cache unless ``keep``."""
        self._allocator.release(prompt.pages[: prompt.full])
        prompt.users -= 1
        if not prompt.users and not keep:
            self._drop(prompt)

    def idle_pages(self) -> int:
        """Pages that ``reclaim`` would free."""
        return sum(len(prompt.pages) for prompt in self._prompts.values() if not prompt.users)

    def reclaim(self, *, but: bytes = b"") -> None:
        """Drop every prompt without users, except the one with key ``but``."""
        for prompt in [p for p in self._prompts.values() if not p.users and p.key != but]:
            self._drop(prompt)

    def release_unwanted(self, key: bytes) -> None:
        """Drop this prompt if it has no users."""
        prompt = self._prompts.get(key)
        if prompt is not None and not prompt.users:
            self._drop(prompt)

    def forget_filled(self) -> None:
        """The weights changed: what was prefilled is used up by its present users and given to nobody else."""
        for prompt in [p for p in self._prompts.values() if p.filled]:
            self._drop(prompt)

    def _drop(self, prompt: SharedPrompt) -> None:
        if self._prompts.get(prompt.key) is prompt:
            del self._prompts[prompt.key]
            self._allocator.release(prompt.pages)
