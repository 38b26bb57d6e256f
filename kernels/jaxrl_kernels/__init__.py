"""Attention kernels for packed training and paged decoding.

Each kernel is a folder: the contract (``__init__.py``), a slow and clear reference, one file per backend, and the table
of cases that every backend must pass. Shapes are written with the letters

    B rows   T tokens in a row   R decode rows   C new tokens of a row   P KV pages   M pages of one row
    N query heads   K KV heads   G query heads per KV head   H head width   S keys looked at together
"""

from jaxrl_kernels.group_decode import Groups, group_decode, make_groups
from jaxrl_kernels.interval_attention import (
    Plan,
    interval_attention,
    interval_attention_with_lse,
    make_plan,
    segment_ends,
)
from jaxrl_kernels.paged_attention import paged_attention, paged_attention_with_lse

__all__ = [
    "Groups",
    "Plan",
    "group_decode",
    "interval_attention",
    "interval_attention_with_lse",
    "make_groups",
    "make_plan",
    "paged_attention",
    "paged_attention_with_lse",
    "segment_ends",
]
