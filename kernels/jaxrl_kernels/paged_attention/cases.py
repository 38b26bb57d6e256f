"""The cases every backend of paged attention must pass against the reference."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape. ``lengths`` holds, for each row, the position of its last query; -1 = the row is empty. ``counts``
    holds how many queries of a row there are, where not all of them are. ``pages`` is the type of those with scales,
    where they are not of ``dtype``."""

    name: str
    lengths: tuple[int, ...]
    count: int = 1
    page: int = 4
    table: int = 10
    query_heads: int = 4
    kv_heads: int = 2
    head_width: int = 8
    window: int = 0
    scale: float | None = None
    soft_cap: float = 0.0
    dtype: str = "float32"
    counts: tuple[int, ...] = ()
    pages: str = ""


CASES = (
    Case("first_token", (0,)),
    Case("decode", (5, 0, 39, 17)),
    Case("empty_rows", (-1, 12, -1)),
    Case("all_empty", (-1, -1)),
    Case("page_edges", (3, 4, 7, 8)),
    Case("window", (30, 2, 11), window=5),
    Case("heads_equal", (9, 21), kv_heads=4),
    Case("one_kv_head", (9, 21), kv_heads=1),
    Case("prefill", (15, 7, 38), count=8),
    Case("prefill_partly_padded", (2, 20, -1), count=6),
    Case("page_of_one", (6, 3), page=1),
    Case("several_blocks", (270, 130, 5), page=16, table=20),
    Case("scale", (9, 21), scale=0.9),
    Case("soft_cap", (5, -1, 39), scale=1.5, soft_cap=2.0),
    Case("soft_cap_several_blocks", (270, 130), page=16, table=20, window=100, scale=1.5, soft_cap=2.0),
    Case("decode_and_prefill", (25, 38, -1, 9), count=8, counts=(1, 8, 0, 3), window=20),
    Case("blocks_of_queries", (299, 280, 5), count=280, page=32, kv_heads=1, counts=(280, 1, 6), dtype="bfloat16"),
    Case("bfloat16", (30, 12), dtype="bfloat16"),
    Case("int8", (30, -1, 12), window=20, pages="int8"),
    Case("int8_prefill", (270, 130, -1), count=6, counts=(6, 1, 0), page=128, table=3, dtype="bfloat16", pages="int8"),
    Case("float8", (270, 15), page=16, table=20, scale=1.5, soft_cap=2.0, pages="float8_e4m3fn"),
    Case("float8_bfloat16", (30, 12), count=4, kv_heads=1, dtype="bfloat16", pages="float8_e4m3fn"),
)
