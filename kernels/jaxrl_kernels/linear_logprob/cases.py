"""The cases every backend of the linear log-probability must pass, forward and backward, against the reference."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape. ``rank`` > 0 adds low-rank factors to the matrix."""

    name: str
    tokens: int = 11
    width: int = 12
    vocabulary: int = 40
    rank: int = 0
    chunk: int = 4
    temperature: float = 1.0
    soft_cap: float = 0.0
    dtype: str = "float32"


CASES = (
    Case("plain"),
    Case("one_token", tokens=1),
    Case("one_chunk", chunk=1024),
    Case("chunks_of_one", chunk=1),
    Case("temperature", temperature=0.6),
    Case("soft_cap", soft_cap=1.5, temperature=0.6),
    Case("low_rank", rank=3, soft_cap=1.5),
    Case("bfloat16", dtype="bfloat16", temperature=0.6),
    Case("bfloat16_low_rank", dtype="bfloat16", rank=3),
)
