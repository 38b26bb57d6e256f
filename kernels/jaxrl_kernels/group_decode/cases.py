"""The cases every backend of group decoding must pass against the reference of paged attention."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape. ``groups`` holds each row's group, -1 = none; ``own`` how many tokens it has of its own, 0 = the row
    is empty; ``shared`` how many pages each group shares; ``pages`` the type of those with scales, where they are
    not of ``dtype``."""

    name: str
    groups: tuple[int, ...]
    own: tuple[int, ...]
    shared: tuple[int, ...] = (3, 5)
    width: int = 4
    page: int = 4
    table: int = 9
    query_heads: int = 4
    kv_heads: int = 2
    head_width: int = 8
    window: int = 0
    scale: float | None = None
    soft_cap: float = 0.0
    dtype: str = "float32"
    pages: str = ""


CASES = (
    Case("one_group", (0, 0, 0), (1, 5, 9), kv_heads=1),
    Case("two_groups_mixed", (1, 0, -1, 1, 0, 0), (2, 3, 17, 1, 4, 8)),
    Case("more_than_a_party", (0, 0, 1, 0, 0, 0), (1, 2, 3, 4, 5, 6), width=2),
    Case("alone", (-1, 0, -1), (7, 3, 1)),
    Case("party_of_one", (0, 0), (4, 2), width=1),
    Case("nothing_shared", (-1, -1), (30, 4)),
    Case("empty_rows", (0, -1, 0, 1), (0, 0, 5, 0)),
    Case("several_blocks", (0, 0, 1), (7, 90, 20), shared=(20, 9), page=16, table=26),
    Case("window", (0, 0, 1), (7, 1, 2), window=6),
    Case("soft_cap", (0, 0, 1), (7, 1, 2), scale=1.5, soft_cap=2.0),
    Case("bfloat16", (0, 0, 1, 0), (7, 90, 20, 4), shared=(20, 9), page=16, table=26, dtype="bfloat16"),
    Case("int8", (0, 0, 1), (7, 90, 20), shared=(20, 9), page=16, table=26, pages="int8"),
    Case("float8", (0, 0, -1, 1), (7, 1, 9, 2), dtype="bfloat16", pages="float8_e4m3fn"),
)
