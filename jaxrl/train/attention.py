"""Whether the kernels that ModelConfig.attention names can be had, and compute what they should on these devices: asked
at start, before anything of the run is traced."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxrl import mesh as meshes
from jaxrl.config import ConfigError, EngineConfig, ModelConfig, PreferConfig, SftConfig, TrainConfig, nearest
from jaxrl.data.tree_packing import sharing_of
from jaxrl.model.implementations import packed_implementation, paged_implementation
from jaxrl.model.packed_attention import score_options
from jaxrl.model.transformer import layer_windows
from jaxrl.records import Batch
from jaxrl.rollout.rounds import attention_shapes, party_of
from jaxrl_kernels import choice, trial
from jaxrl_kernels.group_decode.prefixes import chosen_for_parties, shape_of_parties
from jaxrl_kernels.interval_attention import backends as interval
from jaxrl_kernels.paged_attention import backends as paged


def check_attention(
    model: ModelConfig, mesh: Mesh | AbstractMesh, sections: Sequence[SftConfig | PreferConfig | TrainConfig]
) -> None:
    """What computes attention over packed rows must run on the devices and take the rows.

    Args:
        model: the architecture.
        mesh: that trains.
        sections: that say how large a micro-batch is.

    Raises:
        ConfigError: kernels are asked for whose devices these are not, or that cannot take the model or the rows.
    """
    _check_backend(model, mesh, interval.BACKENDS, _packed_shapes(model, mesh, sections))


def packed_kernels(
    model: ModelConfig, mesh: Mesh | AbstractMesh, sections: Sequence[SftConfig | PreferConfig | TrainConfig]
) -> list[str]:
    """What computes attention over packed rows and in which blocks, a line for each shape: the last bits of a run
    depend on it. Arguments as ``check_attention``."""
    lines = []
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        for shape in dict.fromkeys(_packed_shapes(model, mesh, sections)):
            backend = interval.chosen(packed_implementation(model), shape)
            row = interval.BACKENDS[backend]
            what = f"{shape.rows} rows{'' if shape.segments or shape.behind else ' that share'}"
            line = _line(f"{what}, {shape.queries} queries to {shape.tokens} keys", backend, row.blocks(shape))
            lines.append(line + (f"; gradients repeat to the bit with {row.repeats} alone" if row.repeats else ""))
    return lines


class Crowding:
    """Says once that packed rows have more segments than what computes attention over them has room for.

    Args:
        model, mesh: as ``check_attention`` takes them.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
        self._model, self._mesh, self._said = model, mesh, False

    def note(self, section: SftConfig | PreferConfig | TrainConfig, batches: Iterable[Batch]) -> str:
        """What to say of micro-batches on the host, of the shape of a section; empty if nothing, or if it was said."""
        (shape,) = _packed_shapes(self._model, self._mesh, [section])
        with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
            backend = interval.chosen(packed_implementation(self._model), shape)
            room = interval.BACKENDS[backend].room(shape)
        if self._said or room == math.inf:
            return ""
        most = max((_most_segments(batch.segment_ids, shape.rows) for batch in batches), default=0)
        if most <= room:
            return ""
        self._said, name = True, type(section).__name__
        return (
            f"a micro-batch has {most} segments in {shape.rows} rows of a device, and {backend!r} has room for {room}: "
            f"attention over such batches is computed by 'xla'. Rows of fewer than {name}.row_tokens="
            f"{section.row_tokens} tokens hold fewer, and fewer than {name}.rows={section.rows} have more room each"
        )


def _most_segments(segment_ids: np.ndarray, rows: int) -> int:
    """Of a device, which has so many rows."""
    begins = (np.diff(segment_ids, axis=1, prepend=0) != 0) & (segment_ids > 0)
    return int(begins.reshape(-1, rows * segment_ids.shape[1]).sum(axis=1).max())


def paged_kernels(engine: EngineConfig, model: ModelConfig, mesh: Mesh | AbstractMesh) -> list[str]:
    """The same of attention over KV pages. Arguments as ``check_paged_attention``."""
    implementation, width = paged_implementation(model), party_of(engine, model, mesh)
    decode, prefill = attention_shapes(engine, model, mesh)

    def line(what: str, backend: str, shape: paged.Shape) -> str:
        what = f"{shape.rows} {what}, {shape.count} {'query' if shape.count == 1 else 'queries'} each"
        return _line(what, backend, paged.BACKENDS[backend].blocks(shape))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        calls = [("rows in pages", paged.chosen(implementation, shape), shape) for shape in (decode, prefill)]
        if width:
            together, alone = chosen_for_parties(implementation, decode, engine.slots, width), calls[0][1]
            calls[:1] = [
                ("prompts in pages that rows read together", together, shape_of_parties(decode, engine.slots, width)),
                ("rows in pages behind their prompts", together, decode),
                *[("rows in pages in layers with a window", alone, decode)] * (layer_windows(model) != [0]),
            ]
        return [line(*call) for call in calls]


def _line(what: str, backend: str, blocks: str) -> str:
    return f"attention, {what}: {backend}" + (f", in blocks of {blocks}" if blocks else "")


def _packed_shapes(
    model: ModelConfig, mesh: Mesh | AbstractMesh, sections: Sequence[SftConfig | PreferConfig | TrainConfig]
) -> list[interval.Shape]:
    batch, parts = (meshes.pieces(axis, meshes.COMPUTE_RULES, mesh) for axis in ("batch", "tokens"))
    ring = model.context_attention == "ring" and parts > 1
    heads = model.query_heads // model.kv_heads, model.head_width, model.compute_dtype
    return [
        interval.Shape(
            section.rows // batch,
            part,
            part if ring else section.row_tokens,
            *heads,
            behind=ring,
            soft_cap=model.attention_soft_cap,
            segments=not (ring or _shares(section)),
        )
        for section in sections
        for part in [section.row_tokens // parts]
    ]


def _shares(section: SftConfig | PreferConfig | TrainConfig) -> bool:
    """Whether rows may hold prompts that trajectories share, or trees of them."""
    return isinstance(section, TrainConfig) and sharing_of(section) is not None


def check_paged_attention(engine: EngineConfig, model: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    """What computes attention over KV pages must run on the devices and take the engine's shapes.

    Args:
        engine: the shapes.
        model: the architecture.
        mesh: of one replica or of all.

    Raises:
        ConfigError: as ``check_attention``.
    """
    shapes = attention_shapes(engine, model, mesh)
    _check_backend(model, mesh, paged.BACKENDS, shapes)
    if width := party_of(engine, model, mesh):
        remedy = f"lower EngineConfig.group_width={engine.group_width}, or set EngineConfig.group_decode='off'"
        together = shape_of_parties(shapes[0], engine.slots, width)
        _check_backend(model, mesh, paged.BACKENDS, [together], " for prompts that rows read together", remedy)


def try_attention(model: ModelConfig, mesh: Mesh, sections: Sequence[SftConfig | PreferConfig | TrainConfig]) -> None:
    """Kernels for packed rows are compared with plain JAX on a device of this process.

    Arguments as ``check_attention``.

    Raises:
        ConfigError: they compute something else.
    """
    tried = {}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        for section, shape in zip(sections, _packed_shapes(model, mesh, sections), strict=True):
            tried.setdefault((interval.chosen(packed_implementation(model), shape), _shares(section)), shape)
    for (backend, by_position), shape in tried.items():
        if not interval.BACKENDS[backend].plain:
            complaint = trial.try_interval_attention(backend, shape, _scores(model), by_position=by_position)
            _believe(backend, "packed rows", complaint)


def try_paged_attention(engine: EngineConfig, model: ModelConfig, mesh: Mesh) -> None:
    """The same of kernels for KV pages. Arguments as ``check_paged_attention``."""
    implementation, width = paged_implementation(model), party_of(engine, model, mesh)
    decode, prefill = attention_shapes(engine, model, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shapes = [(shape, paged.chosen(implementation, shape)) for shape in (decode, prefill)]
        together = chosen_for_parties(implementation, decode, engine.slots, width) if width else ""
    for shape, backend in shapes:
        if not paged.BACKENDS[backend].plain:
            _believe(backend, "KV pages", trial.try_paged_attention(backend, shape, _scores(model)))
    if together and not paged.BACKENDS[together].plain:
        complaint = trial.try_group_decode(together, decode, width, _scores(model))
        _believe(together, "KV pages that rows share", complaint)


def _scores(model: ModelConfig) -> trial.Scores:
    return trial.Scores(**score_options(model), windows=layer_windows(model))


def _believe(backend: str, what: str, complaint: str) -> None:
    if complaint:
        raise ConfigError(
            f"attention over {what} by {backend!r} is not that of plain JAX on this {choice.device_kind()}: "
            f"{complaint}; set ModelConfig.attention='xla', and report it"
        )


def check_name(model: ModelConfig) -> None:
    """``ModelConfig.attention`` must name a backend.

    Raises:
        ConfigError: it does not; the message has the name most like it.
    """
    names = dict.fromkeys(("auto", *interval.BACKENDS, *paged.BACKENDS))
    if model.attention not in names:
        raise ConfigError(
            f"ModelConfig.attention={model.attention!r} names no kernels{nearest(model.attention, names)}; "
            f"there are {', '.join(names)}"
        )


def _check_backend(
    model: ModelConfig,
    mesh: Mesh | AbstractMesh,
    table: Mapping[str, choice.Backend],
    shapes: Sequence[Any],
    what: str = "",
    remedy: str = "set it to 'auto'",
) -> None:
    check_name(model)
    if model.attention not in table:  # "auto", or kernels that are not for this
        return
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if reason := choice.refusal(table[model.attention], shapes):
            raise ConfigError(f"ModelConfig.attention={model.attention!r}{what} {reason}; {remedy}")
