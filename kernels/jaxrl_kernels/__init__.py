"""Kernels: attention for packed training and paged decoding, and log-probabilities over a vocabulary.

Each kernel is a folder: the contract (``__init__.py``), a slow and clear reference, one file per backend, and the table
of cases that every backend must pass. Shapes are written with the letters

    B rows   T tokens in a row   R decode rows   C new tokens of a row   P KV pages   M pages of one row
    N query heads   K KV heads   G query heads per KV head   H head width   S keys looked at together
    D model width   V vocabulary
"""

from jaxrl_kernels.group_decode import GroupPlan, Groups, group_decode, make_group_plan, make_groups
from jaxrl_kernels.interval_attention import (
    Plan,
    interval_attention,
    interval_attention_with_lse,
    make_plan,
    segment_ends,
)
from jaxrl_kernels.linear_logprob import LinearLogprob, linear_logprob
from jaxrl_kernels.paged_attention import PagedPlan, make_paged_plan, paged_attention, paged_attention_with_lse
from jaxrl_kernels.ring_attention import RingPlan, make_ring_plan, ring_attention

__all__ = [
    "GroupPlan",
    "Groups",
    "LinearLogprob",
    "PagedPlan",
    "Plan",
    "RingPlan",
    "group_decode",
    "interval_attention",
    "interval_attention_with_lse",
    "linear_logprob",
    "make_group_plan",
    "make_groups",
    "make_paged_plan",
    "make_plan",
    "make_ring_plan",
    "paged_attention",
    "paged_attention_with_lse",
    "ring_attention",
    "segment_ends",
]
