"""Packs texts of many lengths into rows of one fixed shape, so that the trainer compiles once.

Rows are filled by best-fit decreasing (asymptotically within 11/9 of the fewest possible rows; Johnson et al., 1974).
The result depends on what is packed, not on the order it came in, so a batch does not depend on which episode ended
first.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxrl.config import ConfigError
from jaxrl.data import tree_packing
from jaxrl.data.segments import Segment, placed
from jaxrl.data.tree_packing import Sharing
from jaxrl.records import Batch, Trajectory


def pack_trajectories(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[float | np.ndarray],
    weights: Sequence[np.ndarray],
    *,
    rows: int,
    row_tokens: int,
    observation_weight: float = 0.0,
    groups: Sequence[int] | None = None,
    sharing: Sharing | None = None,
) -> list[Batch]:
    """Pack the trajectories of one optimizer update, prompt and response each, into micro-batches.

    Args:
        trajectories: distinct by (draw, sample).
        advantages: of each trajectory, one value or [T] over its response.
        weights: of each trajectory, [T] over its response, as ``aggregation_weights`` makes them.
        rows: rows of a micro-batch.
        row_tokens: tokens of a row.
        observation_weight: of the mean cross-entropy of the tool turns' tokens, all that the environment wrote in them.
        groups: of each trajectory, for a loss that compares those of a group.
        sharing: what trajectories of a group have in common lies in the rows once; None packs each by itself.

    Returns:
        Micro-batches of numpy arrays, all [rows, row_tokens]; as few as the packing needs, none for no trajectories.
        Rows and tokens left over hold zeros, segment id 0. With ``sharing`` every batch has a ``tree`` of these rows.

    Raises:
        ValueError: a trajectory does not fit into a row, or has no prompt.
    """
    remedy = "raise TrainConfig.row_tokens or lower EngineConfig.max_response_tokens"
    observed = sum(turn.end - turn.start for one in trajectories for turn in one.turns if turn.author == "tool")
    together = zip(trajectories, advantages, weights, groups or [None] * len(trajectories), strict=True)
    segments = []
    for trajectory, advantage, weight, group in sorted(together, key=lambda item: (item[0].draw, item[0].sample)):
        tokens = np.concatenate([trajectory.prompt_ids, trajectory.ids])
        name = f'problem "{trajectory.problem.id}" (draw {trajectory.draw}, sample {trajectory.sample})'
        _check_fit(name, len(tokens), row_tokens, remedy)
        before = len(trajectory.prompt_ids)
        segments.append(
            Segment(
                tokens=tokens,
                mask=_after(before, trajectory.mask),
                values={
                    "rl_weights": _after(before, weight),
                    "kl_weights": _after(before, weight),
                    "ce_weights": _after(before, _observations(trajectory) * (observation_weight / max(observed, 1))),
                    "advantages": _after(before, advantage * trajectory.mask.astype(np.float32)),
                    "behaviour_logprobs": _after(before, trajectory.logprobs),
                    "proximal_logprobs": _after(before, trajectory.logprobs),
                    "versions": np.concatenate([np.zeros(before, np.int32), trajectory.versions]),
                    **({} if group is None else {"groups": np.full(len(tokens), group, np.int32)}),
                    **({} if trajectory.experts is None else {"experts": trajectory.experts}),
                },
                prompt_tokens=before,
                group=trajectory.draw,
            )
        )
        _check_first(name, segments[-1].mask)
    if sharing is not None:
        return tree_packing.pack(segments, sharing, rows=rows, row_tokens=row_tokens)
    return _pack([(segment,) for segment in segments], rows, row_tokens)


def pack_sequences(
    sequences: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    rows: int,
    row_tokens: int,
    update: Literal["all", "batch"] = "all",
    row_tokens_key: str = "SftConfig.row_tokens",
) -> list[Batch]:
    """Pack demonstrations into batches; every token to be learned weighs the same within one update.

    Args:
        sequences: (ids, mask), both [T]; mask 1 on the tokens to be learned.
        rows: rows of a batch.
        row_tokens: tokens of a row.
        update: what one optimizer update sums over and the weights therefore sum to 1 over: "all" batches
            (they are micro-batches) or each "batch" alone.
        row_tokens_key: the field that ``row_tokens`` is from, for errors.

    Returns:
        Batches of numpy arrays, all [rows, row_tokens]. Long and short sequences are spread evenly over them.

    Raises:
        ValueError: a sequence does not fit into a row, or its first token is to be learned.
    """
    segments = []
    for index, (ids, mask) in enumerate(sequences):
        _check_fit(f"demonstration {index}", len(ids), row_tokens, f"raise {row_tokens_key} or leave it out")
        learned = np.asarray(mask, np.float32)
        _check_first(f"demonstration {index}", learned)
        segments.append(Segment(np.asarray(ids), learned, {"ce_weights": learned}))
    segments.sort(key=lambda segment: (segment.tokens.tobytes(), segment.mask.tobytes()))
    batches = _pack([(segment,) for segment in segments], rows, row_tokens)
    total = sum(float(segment.mask.sum()) for segment in segments)
    return [
        batch.replace(ce_weights=batch.ce_weights / np.float32(max(total if update == "all" else batch.mask.sum(), 1)))
        for batch in batches
    ]


def pack_couples(
    couples: Sequence[tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]],
    signs: Sequence[float],
    *,
    rows: int,
    row_tokens: int,
    learned_weight: float = 0.0,
) -> list[Batch]:
    """Pack couples of sequences, each couple as segments 2i - 1 and 2i of one row; every batch is an update.

    The last token of a couple's first sequence has the couple's weight in the mean over those of the batch, in
    ``rl_weights``, and its sign, in ``advantages``.

    Args:
        couples: (ids, mask) of both sequences, all [T].
        signs: of each couple.
        rows: rows of a batch.
        row_tokens: tokens of a row.
        learned_weight: of the mean cross-entropy over the masked tokens of first sequences, in ``ce_weights``.

    Raises:
        ConfigError: a couple does not fit into a row.
        ValueError: the first token of a sequence is masked.
    """
    units = []
    for index, (couple, sign) in enumerate(zip(couples, signs, strict=True)):
        name = f"couple {index} of answers"
        _check_fit(
            name, sum(len(ids) for ids, _ in couple), row_tokens, "raise PreferConfig.row_tokens or leave it out"
        )
        unit = []
        for number, (ids, mask) in enumerate(couple):
            learned, last = np.asarray(mask, np.float32), np.zeros(len(ids), np.float32)
            _check_first(name, learned)
            last[-1:] = number == 0
            values = {"rl_weights": last, "advantages": last * np.float32(sign)}
            values["ce_weights"] = learned * np.float32(learned_weight * (number == 0))
            unit.append(Segment(np.asarray(ids), learned, values))
        units.append(unit)
    return [
        batch.replace(
            rl_weights=batch.rl_weights / np.float32(max(batch.rl_weights.sum(), 1)),
            ce_weights=batch.ce_weights / np.float32(max(np.count_nonzero(batch.ce_weights), 1)),
        )
        for batch in _pack(units, rows, row_tokens)
    ]


def pack_steps(sequences: Sequence[tuple[np.ndarray, np.ndarray]], *, rows: int, row_tokens: int) -> list[Batch]:
    """Pack answers whose steps were judged; every batch is an update.

    Args:
        sequences: (ids, signs) both [T]; sign 1 or -1 on the last token of a step that is right or wrong, else 0.
        rows: rows of a batch.
        row_tokens: tokens of a row.

    Returns:
        Batches in which every step has its weight in the mean over those of the batch, in ``rl_weights``, and its sign,
        in ``advantages``.

    Raises:
        ConfigError: a sequence does not fit into a row.
    """
    units = []
    for index, (ids, signs) in enumerate(sequences):
        name = f"answer {index}"
        _check_fit(name, len(ids), row_tokens, "raise PreferConfig.row_tokens or leave it out")
        ends = np.abs(signs).astype(np.float32)
        values = {"rl_weights": ends, "advantages": np.asarray(signs, np.float32)}
        units.append((Segment(np.asarray(ids), ends, values),))
    return [
        batch.replace(rl_weights=batch.rl_weights / np.float32(max(batch.rl_weights.sum(), 1)))
        for batch in _pack(units, rows, row_tokens)
    ]


def unpack_responses(
    values: Sequence[np.ndarray], trajectories: Sequence[Trajectory], *, rows: int, row_tokens: int
) -> list[np.ndarray]:
    """What was computed of packed trajectories, back in their order.

    Args:
        values: of each batch that ``pack_trajectories`` made of them, [rows, row_tokens].
        trajectories: in any order, the same as were packed.
        rows: rows of a micro-batch.
        row_tokens: tokens of a row.

    Returns:
        [T_i] over the response of each.
    """
    order = sorted(range(len(trajectories)), key=lambda i: (trajectories[i].draw, trajectories[i].sample))
    lengths = [len(trajectories[i].prompt_ids) + len(trajectories[i].ids) for i in order]
    found: list[np.ndarray] = [np.zeros(0)] * len(trajectories)
    for batch, filled in zip(values, _of_lengths(lengths, rows, row_tokens), strict=True):
        for row, members in zip(batch, filled, strict=False):
            start = 0
            for member in members:
                end = start + lengths[member]
                before = len(trajectories[order[member]].prompt_ids)
                found[order[member]] = row[start + before : end]
                start = end
    return found


def _pack(units: Sequence[Sequence[Segment]], rows: int, row_tokens: int) -> list[Batch]:
    """Pack units of segments that stand side by side in one row."""
    lengths = [sum(len(segment.tokens) for segment in unit) for unit in units]
    return [
        _batch([[segment for i in row for segment in units[i]] for row in batch], rows, row_tokens)
        for batch in _of_lengths(lengths, rows, row_tokens)
    ]


def _of_lengths(lengths: Sequence[int], rows: int, row_tokens: int) -> list[list[list[int]]]:
    """Indices of the units of these lengths in each row of each batch."""
    return placed([(length,) for length in lengths], rows, (row_tokens,))


def _batch(filled: Sequence[Sequence[Segment]], rows: int, row_tokens: int) -> Batch:
    recorded = (segment.values["experts"] for row in filled for segment in row if "experts" in segment.values)
    batch = Batch.zeros(rows, row_tokens, next(recorded, None))
    if any("groups" in segment.values for row in filled for segment in row):
        batch = batch.replace(groups=np.zeros((rows, row_tokens), np.int32))
    for row, segments in enumerate(filled):
        start = 0
        for number, segment in enumerate(segments, 1):
            span = row, slice(start, start + len(segment.tokens))
            batch.tokens[span] = segment.tokens
            batch.positions[span] = np.arange(len(segment.tokens))
            batch.segment_ids[span] = number
            batch.mask[span] = segment.mask
            for name, values in segment.values.items():
                getattr(batch, name)[span] = values
            start += len(segment.tokens)
    return batch


def _observations(trajectory: Trajectory) -> np.ndarray:
    """[T] float32, 1 on the tokens of tool turns."""
    mark = np.zeros(len(trajectory.ids), np.float32)
    for turn in trajectory.turns:
        if turn.author == "tool":
            mark[turn.start : turn.end] = 1
    return mark


def _after(prompt_tokens: int, values: np.ndarray) -> np.ndarray:
    """``values`` [T] of the response behind zeros for the prompt, as float32."""
    return np.concatenate([np.zeros(prompt_tokens, np.float32), np.asarray(values, np.float32)])


def _check_fit(name: str, tokens: int, row_tokens: int, remedy: str) -> None:
    if tokens > row_tokens:
        raise ConfigError(f"{name} has {tokens} tokens but a packed row holds row_tokens={row_tokens}; {remedy}")


def _check_first(name: str, mask: np.ndarray) -> None:
    if len(mask) and mask[0]:
        raise ValueError(f"the first token of {name} is to be learned but nothing precedes it; put a prompt before it")
