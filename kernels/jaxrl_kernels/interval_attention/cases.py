"""The cases every backend of interval attention must pass, forward and backward, against the reference."""

import dataclasses
import itertools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape and one mask. ``mask`` is causal, segments, padded, prefix, tree or nothing (all rows masked)."""

    name: str
    mask: str
    batch: int = 2
    tokens: int = 24
    query_heads: int = 4
    kv_heads: int = 2
    head_width: int = 8
    window: int = 0
    scale: float | None = None
    soft_cap: float = 0.0
    first: int = 0
    by_position: bool = False  # the window counts the tokens between a query and a key that the query sees
    dtype: str = "float32"

    def ends(self) -> np.ndarray:
        """[B, T] int32 of the mask."""
        tokens = self.tokens
        end = np.zeros((self.batch, tokens), np.int32)
        match self.mask:
            case "causal":
                end[:] = tokens
            case "segments":
                for row, cut in zip(end, range(1, self.batch + 1), strict=True):
                    edges = [0, cut, tokens // 3, tokens // 2 + cut, tokens]
                    for left, right in itertools.pairwise(edges):
                        row[left:right] = right
            case "padded":
                for row, pad in zip(end, range(1, self.batch + 1), strict=True):
                    row[: tokens - 3 * pad] = tokens - 3 * pad
            case "prefix":
                prompt, responses = tokens // 4, 3
                size = (tokens - prompt) // responses
                end[:, :prompt] = prompt + responses * size
                for response in range(responses):
                    left = prompt + response * size
                    end[:, left : left + size] = left + size
            case "tree":
                self._tree(end, 0, tokens, np.random.default_rng(7))
            case "nothing":
                pass
        return end

    def positions(self) -> np.ndarray | None:
        """[B, T] int32: of every token how many others it sees without a window, in rows where it sees its past."""
        if not self.by_position:
            return None
        index = np.arange(self.tokens)
        sees = (index[None, :] < index[:, None]) & (index[:, None] < self.ends()[:, None, :])
        return sees.sum(axis=2).astype(np.int32)

    def _tree(self, end: np.ndarray, left: int, right: int, generator: np.random.Generator) -> None:
        """A random tree in depth-first order: a run of tokens, then two subtrees."""
        if right <= left:
            return
        run = left + int(generator.integers(1, max(2, (right - left) // 2 + 1)))
        end[:, left:run] = right
        middle = (run + right) // 2
        self._tree(end, run, middle, generator)
        self._tree(end, middle, right, generator)


CASES = (
    Case("one_token", "causal", batch=1, tokens=1),
    Case("causal", "causal"),
    Case("segments", "segments", batch=3),
    Case("padded", "padded"),
    Case("prefix", "prefix"),
    Case("tree", "tree"),
    Case("nothing", "nothing"),
    Case("window", "segments", window=3),
    Case("window_one", "causal", window=1),
    Case("few_heads", "segments", batch=1, query_heads=2, kv_heads=1),
    Case("heads_equal", "segments", kv_heads=4),
    Case("one_kv_head", "tree", kv_heads=1),
    Case("bfloat16", "segments", dtype="bfloat16"),
    Case("scale", "segments", scale=0.9),
    Case("soft_cap", "segments", scale=1.5, soft_cap=2.0),
    Case("soft_cap_padded_bfloat16", "padded", scale=1.5, soft_cap=2.0, dtype="bfloat16"),
    Case("split_segments", "segments", batch=3, first=9),
    Case("split_window", "tree", window=5, first=18),
    Case("split_chunked", "padded", batch=1, tokens=400, first=100),
    Case("chunked_segments", "segments", tokens=300),
    Case("chunked_padded", "padded", tokens=257, kv_heads=1),
    Case("chunked_tree_window", "tree", batch=1, tokens=400, window=150),
    Case("chunked_window_by_position", "causal", batch=1, tokens=800, window=100, by_position=True),
    Case("window_by_position", "causal", tokens=40, window=6, by_position=True),
    Case("tree_window", "tree", window=4, by_position=True),
    Case("prefix_window", "prefix", tokens=40, window=6, by_position=True),
    Case("split_tree_window", "tree", window=5, first=18, by_position=True),
    Case("chunked_tree_window_by_position", "tree", batch=1, tokens=800, window=60, by_position=True),
    Case("chunked_prefix_window_by_position", "prefix", tokens=1100, window=90, kv_heads=1, by_position=True),
    Case("chunked_soft_cap_window", "segments", tokens=300, window=40, scale=1.5, soft_cap=2.0),
)
