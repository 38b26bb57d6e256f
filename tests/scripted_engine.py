"""An engine that plays given texts, for tests of the episode driver without a model."""

import asyncio
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence

import numpy as np

from jaxrl.text.tokenizer import Tokenizer, train_sentencepiece

Script = Callable[[int, int], Sequence[str]]
"""(draw, sample) → the text of each turn, without its <|im_end|>."""

UNFINISHED = "…"
"""A turn that ends in this never stops: it is cut there as if the tokens had run out."""


@dataclasses.dataclass(frozen=True)
class ScriptedSample:
    ids: list[int]
    logprobs: list[float]
    versions: list[int]
    stopped: bool
    seconds: float
    experts: None = None  # a script chooses none


class ScriptedEngine:
    """Plays ``script`` and keeps count of what is open; ``slots`` sequences at once."""

    def __init__(
        self, tokenizer: Tokenizer, script: Script, *, slots: int = 1 << 30, delay: Callable[[], float] | None = None
    ):
        self.tokenizer = tokenizer
        self.script = script
        self.delay = delay
        self.seconds = 0.0  # that each sample says it took
        self.version = 3
        self.opened: list[tuple[int, int]] = []
        self.temperatures: set[float | None] = set()
        self.active: set[ScriptedSequence] = set()
        self.most_active = 0
        self._admission = asyncio.Semaphore(slots)

    async def open(
        self, prompt_ids: np.ndarray, *, draw: int, sample: int, max_tokens: int, temperature: float | None = None
    ) -> "ScriptedSequence":
        await self._admission.acquire()
        self.opened.append((draw, sample))
        self.temperatures.add(temperature)
        sequence = ScriptedSequence(self, list(self.script(draw, sample)), max_tokens)
        self.active.add(sequence)
        self.most_active = max(self.most_active, len(self.active))
        return sequence

    def leave(self, sequence: "ScriptedSequence") -> None:
        if sequence in self.active:
            self.active.remove(sequence)
            self._admission.release()


class ScriptedSequence:
    def __init__(self, engine: ScriptedEngine, turns: list[str], max_tokens: int) -> None:
        self.engine = engine
        self.turns = turns
        self.room = max_tokens
        self.appended: list[list[int]] = []

    async def generate(self, max_new_tokens: int) -> ScriptedSample:
        assert 0 < max_new_tokens <= self.room
        await asyncio.sleep(self.engine.delay() if self.engine.delay else 0)
        text = self.turns.pop(0)
        tokenizer = self.engine.tokenizer
        ids = tokenizer.encode(text.removesuffix(UNFINISHED), special=True)
        if not text.endswith(UNFINISHED):
            ids = [*ids, tokenizer.end_id]
        ids = ids[:max_new_tokens]
        self.room -= len(ids)
        return ScriptedSample(
            ids, [-0.5] * len(ids), [self.engine.version] * len(ids), ids[-1] == tokenizer.end_id, self.engine.seconds
        )

    def append(self, ids: Sequence[int]) -> None:
        self.room -= len(ids)
        assert self.room > 0, "no room is left for the policy"
        self.appended.append(list(ids))

    def close(self) -> None:
        self.engine.leave(self)


@functools.cache
def small_tokenizer() -> Tokenizer:
    """A tokenizer trained on the spot, byte fallback included."""
    texts = [
        "Ann has 12 apples and buys 3 more. How many apples are there now?",
        'add them</reason>\n<tool_call>{"name": "python", "arguments": {"code": "print(12+3)"}}</tool_call>',
        "so it is</reason>\n<answer>\\boxed{15}</answer>",
        "NameError: name 'x' is not defined",
    ]
    return train_sentencepiece(texts * 4, 380)


def call(code: str, reasoning: str = "try") -> str:
    """A policy turn that calls the Python tool."""
    request = json.dumps({"name": "python", "arguments": {"code": code}}, ensure_ascii=False)
    return f"{reasoning}</reason>\n<tool_call>{request}</tool_call>"


def answer(value: str, reasoning: str = "so") -> str:
    """A policy turn that answers."""
    return f"{reasoning}</reason>\n<answer>\\boxed{{{value}}}</answer>"
