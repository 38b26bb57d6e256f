"""Which sequences are admitted, which decode, which pages they get: all host-side, no device and no clock.

* **Admission** (first come, first served): a sequence is admitted when the free pages cover its prompt and its reserve,
  beyond what admitted sequences have reserved. With a reserve of the longest possible response nothing ever has to be
  taken back; with a quantile of recent lengths more sequences are in flight, and a low-water mark of one page for each
  of them stays free.
* **Slots**: a sequence holds a decode slot only while it generates. While its tool runs it keeps its pages and
  somebody else decodes, so pages bound the sequences in flight and slots bound the width of a decode step.
* **Preemption**: when pages run out all the same, the youngest sequence gives all of its pages back; when its turn
  comes its tokens, which the host keeps, are prefilled again.

How a sequence is cut into prefill chunks depends on that sequence alone (its prompt from position 0; then what was
appended since it last generated), so what it computes does not depend on its neighbours.
"""

import collections
import dataclasses
import heapq
import math
from collections.abc import Sequence as SequenceOf

import numpy as np

from jaxrl.config import ConfigError, EngineConfig
from jaxrl.rollout import rounds
from jaxrl.rollout.cache import PageAllocator, PromptCache, SharedPrompt, pages_for

RECENT_LENGTHS = 256
"""Response lengths remembered for the reserve."""
ENOUGH_LENGTHS = 16
"""Before this many are known the reserve is the longest possible response."""
EARLY_EXIT = 8
"""While sequences wait for a slot, a round ends once one slot in this many is free."""
USUAL_PAGE = 128
"""Tokens of a page that kernels may ask for, also where no sequence is as long."""


@dataclasses.dataclass(eq=False)
class Track:
    """What the scheduler knows about one sequence.

    Attributes:
        ticket: age; the smaller, the older.
        tokens: prompt and response so far.
        cached: tokens whose keys and values are in pages.
        goal: response tokens at which the running generation ends; 0 = it is not generating.
        pages: its own pages, following the shared ones.
        reserved: pages set aside for it beyond those it holds.
        admitted: whether it holds (or may take) pages now.
    """

    ticket: int
    prompt: np.ndarray  # [n] int32
    draw: int
    sample: int
    max_tokens: int
    temperature: float
    key: bytes
    tokens: list[int]
    cached: int = 0
    goal: int = 0
    shared: SharedPrompt | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    reserved: int = 0
    slot: int = -1
    admitted: bool = False
    closed: bool = False

    @property
    def response_tokens(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def generating(self) -> bool:
        return self.goal > self.response_tokens


@dataclasses.dataclass(frozen=True)
class Cycle:
    """Device work between two decisions of the host, in this order."""

    prompts: tuple[np.ndarray, ...]  # prefill plans of shared prompts
    copies: tuple[np.ndarray, ...]  # copies of their tails
    texts: tuple[np.ndarray, ...]  # prefill plans of appended or preempted tokens
    decode: np.ndarray  # decode plan
    exit_at: int
    prefill_tokens: int


def pages_of(config: EngineConfig) -> tuple[int, int]:
    """The most pages of a sequence, and the pages of an engine.

    Raises:
        ConfigError: they cannot hold one longest sequence, or one page would hold far more.
    """
    longest = config.max_prompt_tokens + config.max_response_tokens
    if config.page_size > max(longest, USUAL_PAGE):
        raise ConfigError(
            f"EngineConfig.page_size={config.page_size} is more than the {longest} tokens of the longest sequence "
            f"(max_prompt_tokens + max_response_tokens); make it at most {max(longest, USUAL_PAGE)}"
        )
    width = pages_for(longest, config.page_size)
    # One page more than the longest sequence: the prompt's tail exists twice, shared and copied.
    pages = config.pages or config.slots * (width + 1)
    if pages < width + 1:
        raise ConfigError(
            f"EngineConfig.pages={pages} of {config.page_size} tokens cannot hold one sequence of "
            f"max_prompt_tokens={config.max_prompt_tokens} and max_response_tokens={config.max_response_tokens}; "
            f"give at least {width + 1} pages, or 0 to let the slots decide"
        )
    return width, pages


class Scheduler:
    """Admission, slots and pages of one engine."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises ConfigError when the longest sequence cannot fit into the pages."""
        self.config = config
        self.table_width, self.total_pages = pages_of(config)
        self.allocator = PageAllocator(self.total_pages)
        self.prompts = PromptCache(self.allocator, config.page_size)
        self.preemptions = 0
        self._open: dict[int, Track] = {}  # by ticket, until closed
        self._draws: collections.Counter[int] = collections.Counter()  # of those
        self._admitted: dict[int, Track] = {}  # by ticket
        self._queue: dict[int, Track] = {}  # by ticket
        self._oldest: list[int] = []  # heap of their tickets; those that left the queue in between are passed over
        self._queued_keys: collections.Counter[bytes] = collections.Counter()
        self._reserved = 0
        self._slots: list[Track | None] = [None] * config.slots
        self._recent: collections.deque[int] = collections.deque(maxlen=RECENT_LENGTHS)
        self._plan = np.zeros((config.slots, rounds.TABLE + self.table_width), np.int32)

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def admitted(self) -> int:
        return len(self._admitted)

    @property
    def open(self) -> int:
        """Sequences submitted and not closed."""
        return len(self._open)

    def plays(self, draw: int) -> bool:
        """Whether a sequence of this draw is open."""
        return draw in self._draws

    @property
    def decoding(self) -> tuple[Track, ...]:
        """The sequences in slots."""
        return tuple(track for track in self._slots if track is not None)

    def submit(self, track: Track) -> None:
        """Put a sequence in the queue for admission."""
        if track.ticket not in self._open:
            self._open[track.ticket] = track
            self._draws[track.draw] += 1
        self._queue[track.ticket] = track
        heapq.heappush(self._oldest, track.ticket)
        self._queued_keys[track.key] += 1

    def admit(self) -> list[Track]:
        """Admit from the head of the queue while pages allow; returns those admitted."""
        admitted = []
        while self._oldest:
            track = self._queue.get(self._oldest[0])
            if track is not None and not self._fits(track):
                break
            heapq.heappop(self._oldest)
            if track is None:
                continue
            self._leave_queue(track)
            self._place(track)
            admitted.append(track)
        return admitted

    def generate(self, track: Track, max_new_tokens: int) -> None:
        """Let it sample up to this many tokens; a preempted sequence asks for admission again."""
        track.goal = track.response_tokens + max_new_tokens
        if not track.admitted:
            self.submit(track)

    def append(self, track: Track, ids: SequenceOf[int]) -> None:
        """Add tokens that are prefilled before it generates next."""
        track.tokens.extend(ids)

    def close(self, track: Track) -> None:
        """Give everything back; idempotent."""
        if track.closed:
            return
        track.closed = True
        del self._open[track.ticket]
        self._draws[track.draw] -= 1
        if not self._draws[track.draw]:
            del self._draws[track.draw]
        if track.ticket in self._queue:
            self._leave_queue(track)
            if not self._queued_keys[track.key]:
                self.prompts.release_unwanted(track.key)
        self._leave_pages(track)
        if track.response_tokens:
            self._recent.append(track.response_tokens)

    def close_all(self) -> None:
        """Close every sequence that is open."""
        for track in list(self._open.values()):
            self.close(track)

    @property
    def full(self) -> bool:
        """Whether every slot would decode in a round planned now."""
        return sum(track.generating for track in self._admitted.values()) >= self.config.slots

    def plan(self) -> Cycle | None:
        """The next device work; None when no admitted sequence generates."""
        while self._fill_slots():
            for track in sorted(self.decoding, key=lambda track: track.ticket):
                if track.slot >= 0:  # an older one may have preempted it just now
                    self._grow(track)
            if self.decoding:
                return self._cycle(self.decoding)
        return None

    def commit(self, track: Track, tokens: SequenceOf[int], stopped: bool) -> bool:
        """Add the tokens a round sampled; returns whether the generation is over, which frees the slot."""
        track.tokens.extend(tokens)
        track.cached = len(track.tokens) - 1
        if stopped:
            track.goal = track.response_tokens
        if track.generating:
            return False
        track.goal = 0
        self._leave_slot(track)
        return True

    def weights_changed(self) -> None:
        """Prompts prefilled with older weights are not given to sequences that have not begun.

        Those admitted to such a prompt ask for admission again; those that have begun go on with what they have.
        """
        for track in list(self._admitted.values()):
            if track.cached == 0 and track.shared is not None and track.shared.filled:
                self._evict(track)
        self.prompts.forget_filled()

    def _reserve(self, track: Track) -> int:
        """Response tokens to expect of this sequence."""
        config = self.config
        if config.reserve_quantile >= 1.0 or len(self._recent) < ENOUGH_LENGTHS:
            return track.max_tokens
        rank = math.ceil(config.reserve_quantile * len(self._recent)) - 1
        expected = sorted(self._recent)[max(rank, 0)]
        return min(track.max_tokens, max(expected, track.response_tokens + config.round_steps))

    def _own_pages(self, track: Track) -> int:
        """Pages of its own that it is expected to need."""
        size = self.config.page_size
        return pages_for(len(track.prompt) + self._reserve(track), size) - (len(track.prompt) - 1) // size

    def _fits(self, track: Track) -> bool:
        prompt = 0 if track.key in self.prompts else pages_for(len(track.prompt) - 1, self.config.page_size)
        low_water = len(self._admitted) if self.config.reserve_quantile < 1.0 else 0
        free = self.allocator.free - self._reserved
        need = prompt + self._own_pages(track) + low_water
        if need <= free:
            return True
        if need <= free + self.prompts.idle_pages():
            self.prompts.reclaim(but=track.key)
            return need <= self.allocator.free - self._reserved
        return False

    def _place(self, track: Track) -> None:
        """Attach to the shared prompt and set the reserve aside."""
        track.reserved = self._own_pages(track)
        track.shared = self.prompts.attach(track.prompt, track.key)
        self._reserved += track.reserved
        track.cached = 0
        track.admitted = True
        self._admitted[track.ticket] = track

    def _leave_queue(self, track: Track) -> None:
        del self._queue[track.ticket]
        self._queued_keys[track.key] -= 1
        if not self._queued_keys[track.key]:
            del self._queued_keys[track.key]

    def _leave_pages(self, track: Track) -> None:
        """Give back slot, pages and reserve."""
        if not track.admitted:
            return
        self._leave_slot(track)
        self.allocator.release(track.pages)
        track.pages = []
        self._reserved -= track.reserved
        track.reserved = 0
        assert track.shared is not None
        self.prompts.detach(track.shared, keep=self._queued_keys[track.key] > 0)
        track.shared = None
        track.cached = 0
        track.admitted = False
        del self._admitted[track.ticket]

    def _leave_slot(self, track: Track) -> None:
        if track.slot >= 0:
            self._slots[track.slot] = None
            self._plan[track.slot] = 0
            track.slot = -1

    def _fill_slots(self) -> bool:
        """Give free slots to generating sequences, oldest first; returns whether any slot is taken."""
        free = [slot for slot, holder in enumerate(self._slots) if holder is None]
        ready = sorted(
            (t for t in self._admitted.values() if t.generating and t.slot < 0), key=lambda track: track.ticket
        )
        for slot, track in zip(free, ready, strict=False):
            track.slot = slot
            self._slots[slot] = track
            row = self._plan[slot]
            row[rounds.PROMPT] = len(track.prompt)
            row[rounds.DRAW] = track.draw
            row[rounds.SAMPLE] = track.sample
            row[rounds.TEMPERATURE] = np.float32(track.temperature).view(np.int32)
            assert track.shared is not None
            row[rounds.SHARED] = track.shared.full
            table = self._table(track)
            row[rounds.TABLE : rounds.TABLE + len(table)] = table
        return any(self._slots)

    def _grow(self, track: Track) -> None:
        """Give it the pages of the coming round, preempting the youngest if there are none."""
        steps = min(self.config.round_steps, track.goal - track.response_tokens)
        assert track.shared is not None
        need = pages_for(len(track.tokens) + steps - 1, self.config.page_size) - track.shared.full - len(track.pages)
        if need <= 0:
            return
        if need > self.allocator.free:
            self.prompts.reclaim()
        while need > self.allocator.free:
            youngest = self._admitted[max(self._admitted)]
            self.preemptions += 1
            self._evict(youngest)
            if youngest is track:
                return
        held = track.shared.full + len(track.pages)
        pages = self.allocator.take(need)
        track.pages.extend(pages)
        self._plan[track.slot, rounds.TABLE + held : rounds.TABLE + held + need] = pages
        granted = min(need, track.reserved)
        track.reserved -= granted
        self._reserved -= granted

    def _evict(self, track: Track) -> None:
        """Take all pages back; what it has is prefilled again once it is admitted again."""
        self._leave_pages(track)
        if track.generating:
            self.submit(track)

    def _cycle(self, running: tuple[Track, ...]) -> Cycle:
        """The work of a round in which these decode; they have their pages."""
        prompts: list[tuple[int, list[int], list[int]]] = []
        texts: list[tuple[int, list[int], list[int]]] = []
        copies: list[tuple[int, int]] = []
        for track in running:
            row = self._plan[track.slot]
            shared = track.shared
            if track.cached == 0 and shared is not None and len(shared.ids):
                if not shared.filled:
                    prompts.extend(self._chunks(0, shared.ids.tolist(), shared.pages))
                    shared.filled = True
                if shared.tail is not None:
                    copies.append((shared.tail, track.pages[0]))
                track.cached = len(shared.ids)
            last = len(track.tokens) - 1
            if track.cached < last:
                texts.extend(self._chunks(track.cached, track.tokens[track.cached : last], self._table(track)))
                track.cached = last
            row[rounds.TOKEN] = track.tokens[-1]
            row[rounds.POSITION] = last
            row[rounds.LEFT] = track.goal - track.response_tokens
        waiting = any(track.generating and track.slot < 0 for track in self._admitted.values()) or bool(self._queue)
        return Cycle(
            prompts=self._pack_chunks(prompts),
            copies=self._pack_copies(copies),
            texts=self._pack_chunks(texts),
            decode=self._plan.copy(),
            exit_at=max(0, len(running) - max(1, self.config.slots // EARLY_EXIT)) if waiting else 0,
            prefill_tokens=sum(len(tokens) for _, tokens, _ in prompts + texts),
        )

    def _table(self, track: Track) -> list[int]:
        assert track.shared is not None
        return track.shared.pages[: track.shared.full] + track.pages

    def _chunks(self, start: int, tokens: list[int], table: list[int]) -> list[tuple[int, list[int], list[int]]]:
        size = self.config.prefill_chunk
        return [(start + cut, tokens[cut : cut + size], table) for cut in range(0, len(tokens), size)]

    def _pack_chunks(self, chunks: list[tuple[int, list[int], list[int]]]) -> tuple[np.ndarray, ...]:
        rows, chunk = self.config.prefill_rows, self.config.prefill_chunk
        plans = []
        for first in range(0, len(chunks), rows):
            plan = np.zeros((rows, rounds.ROW_TABLE + self.table_width + chunk), np.int32)
            for row, (start, tokens, table) in zip(plan, chunks[first : first + rows], strict=False):
                row[rounds.START], row[rounds.COUNT] = start, len(tokens)
                row[rounds.ROW_TABLE : rounds.ROW_TABLE + len(table)] = table
                row[-chunk : len(row) - chunk + len(tokens)] = tokens
            plans.append(plan)
        return tuple(plans)

    def _pack_copies(self, copies: list[tuple[int, int]]) -> tuple[np.ndarray, ...]:
        if not copies:
            return ()
        plan = np.full((2, self.config.slots), self.total_pages, np.int32)
        plan[0] = 0
        plan[:, : len(copies)] = np.array(copies, np.int32).T
        return (plan,)
