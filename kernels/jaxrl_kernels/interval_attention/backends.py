"""The table of backends, and which of them runs where. A new one is a file and a row here."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from jaxrl_kernels import choice
from jaxrl_kernels.choice import device_kind
from jaxrl_kernels.interval_attention import cudnn, plan, reference, tpu, xla
from jaxrl_kernels.interval_attention.blocks import HOPPER, HOPPER_WIDTHS, blocks_for
from jaxrl_kernels.interval_attention.pairs import Pairs, longest_list, make_pairs
from jaxrl_kernels.interval_attention.tables import Tables, make_tables

HOPPER_KINDS = ("NVIDIA H100", "NVIDIA H200", "NVIDIA H20", "NVIDIA H800", "NVIDIA GH200")
BLACKWELL_KINDS = ("NVIDIA B100", "NVIDIA B200", "NVIDIA B300", "NVIDIA GB200", "NVIDIA GB300")

LONGEST_LIST = 1 << 17
"""Entries of a list of pairs: half of the scalar memory of a TPU, which has 1 MiB."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a plan is made for.

    Attributes:
        rows: of a device.
        queries, tokens: of a row; its keys are all of its tokens.
        groups: query heads that share a KV head.
        head_width, dtype: of them.
        behind: the queries may lie behind keys that are not theirs.
        soft_cap: on the scores; 0 for none.
        segments: the mask is known to be one of packed segments and padding.
    """

    rows: int
    queries: int
    tokens: int
    groups: int
    head_width: int
    dtype: str
    behind: bool = False
    soft_cap: float = 0.0
    segments: bool = True


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to compute interval attention.

    Attributes:
        plan: ``(end, first, shape)`` -> what ``attend`` needs of the mask, a tree of arrays whose first two axes are
            split on a mesh as rows and tokens are.
        attend: ``(q, k, v, end, window, first, scale, soft_cap, places, the plan)`` -> what is attended to
            [B, Q, N, H] in q's type and the log-sum-exp [B, Q, N] in float32; both can be differentiated. Tokens of
            padding hold zeros. ``places`` are the positions of queries [B, Q] and keys [B, T], or None.
        devices: beginnings of the kinds of device, as jax says them, that it runs on.
        unfit: why it cannot take a shape, empty if it can.
        blocks: in which blocks it computes a shape, empty where nothing but the backend decides that.
        automatic: "auto" may take it.
        plain: it is plain JAX, by which others are judged.
        attend_alone: the same without the log-sum-exp, if there is a better way then; None takes it from ``attend``.
        room: for segments in the rows of a device; batches with more are computed as by "xla".
        repeats: what it takes for equal bits in every run; empty where they always are.
    """

    plan: Callable[[jax.Array, int | jax.Array, Shape], Any]
    attend: Callable[..., tuple[jax.Array, jax.Array]]
    devices: tuple[str, ...] = ("",)
    unfit: Callable[[Shape], str] = lambda shape: ""
    blocks: Callable[[Shape], str] = lambda shape: ""
    automatic: bool = False
    plain: bool = False
    attend_alone: Callable[..., jax.Array] | None = None
    room: Callable[[Shape], float] = lambda shape: math.inf
    repeats: str = ""


def _key_blocks(end: jax.Array, first: int | jax.Array, shape: Shape) -> plan.KeyBlocks:
    return plan.key_blocks(end, queries=shape.queries, first=first)


def _pairs(end: jax.Array, first: int | jax.Array, shape: Shape) -> Pairs:
    blocks = blocks_for(device_kind(), shape.head_width, shape.groups, shape.queries, shape.tokens)
    return make_pairs(end, queries=shape.queries, first=first, blocks=blocks, behind=shape.behind)


def _unfit_for_tpu(shape: Shape) -> str:
    blocks = blocks_for(device_kind(), shape.head_width, shape.groups, shape.queries, shape.tokens)
    entries = longest_list(shape.rows, shape.queries, shape.tokens, blocks, shape.behind)
    if entries > LONGEST_LIST:
        return (
            f"{shape.rows} rows of {shape.tokens} tokens on a device need a list of {entries} pairs of blocks, and "
            f"there is room for {LONGEST_LIST}"
        )
    return ""


def _blocks_on_tpu(shape: Shape) -> str:
    blocks = blocks_for(device_kind(), shape.head_width, shape.groups, shape.queries, shape.tokens)
    return f"{blocks.queries} queries by {blocks.keys} keys"


def _tables(end: jax.Array, first: int | jax.Array, shape: Shape) -> Tables:
    return make_tables(end, queries=shape.queries, first=first, blocks=HOPPER)


def _attend_on_hopper(*arguments: Any, interpret: bool) -> tuple[jax.Array, jax.Array]:
    # Its compiler takes a third of a second to load, and is not in every build of jax: only who uses it needs it.
    from jaxrl_kernels.interval_attention import mosaic_gpu

    return mosaic_gpu.interval_attention(*arguments, interpret=interpret)


def _unfit_for_hopper(shape: Shape) -> str:
    if shape.head_width not in HOPPER_WIDTHS or shape.dtype != "bfloat16":
        widths = " or ".join(map(str, HOPPER_WIDTHS))
        return f"heads {widths} wide in bfloat16 are needed, not {shape.head_width} in {shape.dtype}"
    return ""


def _segments(end: jax.Array, first: int | jax.Array, shape: Shape) -> cudnn.Plan:
    return cudnn.make_plan(end)


def _unfit_for_cudnn(shape: Shape) -> str:
    if not shape.segments:
        return "packed segments are needed, and rows hold shared prompts, trees or parts of rows"
    if shape.behind or shape.queries < shape.tokens:
        return "whole rows are needed, and the queries are a part of a row"
    if shape.soft_cap:
        return f"it has no soft cap on the scores, which is {shape.soft_cap}"
    # What cuDNN computes of Blackwell's backward pass ends at heads of 128.
    widest = 256 if device_kind().startswith(HOPPER_KINDS) else 128
    return cudnn.unfit(shape.head_width, shape.dtype, widest)


BACKENDS: dict[str, Backend] = {
    "tpu": Backend(
        _pairs, tpu.interval_attention, choice.TPUS, unfit=_unfit_for_tpu, blocks=_blocks_on_tpu, automatic=True
    ),
    "cudnn": Backend(
        _segments,
        cudnn.interval_attention_with_lse,
        devices=(*HOPPER_KINDS, *BLACKWELL_KINDS),
        unfit=_unfit_for_cudnn,
        attend_alone=cudnn.interval_attention,
        automatic=True,
        room=lambda shape: cudnn.room(shape.rows, shape.tokens),
        repeats="XLA_FLAGS=--xla_gpu_deterministic_ops=true",
    ),
    "xla": Backend(_key_blocks, xla.interval_attention, automatic=True, plain=True),
    "tpu_interpreted": Backend(_pairs, functools.partial(tpu.interval_attention, interpret=True)),
    "mosaic_gpu": Backend(
        _tables, functools.partial(_attend_on_hopper, interpret=False), devices=HOPPER_KINDS, unfit=_unfit_for_hopper
    ),
    "mosaic_gpu_interpreted": Backend(_tables, functools.partial(_attend_on_hopper, interpret=True)),
    "reference": Backend(lambda end, first, shape: (), reference.interval_attention, plain=True),
}
"""By the name that ``implementation`` gives, in the order in which "auto" tries those that it may take: not yet
"mosaic_gpu", whose products no interpreter has. Interpreted ones are for tests on machines without a TPU or GPU."""


def chosen(implementation: str, *shapes: Shape) -> str:
    """Name of the backend for shapes on the devices at hand, as ``choice.chosen`` finds it."""
    return choice.chosen(BACKENDS, implementation, shapes, "interval attention")
