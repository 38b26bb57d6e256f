"""Import and export of Hugging Face folders: config.json and safetensors, single or sharded.

Which tensor is which parameter, and how it lies, is read from the parameter table (``ParamSpec.hf_name`` and
``hf_layout``). Both directions go tensor by tensor, every tensor is accounted for before anything is allocated, and an
export takes its name only after it was read back and compared.
"""

import dataclasses
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxrl.config import ConfigError, ModelConfig
from jaxrl.mesh import PARAM_RULES, Rules
from jaxrl.model import compare
from jaxrl.model.companions import GENERATION_CONFIG, merged_generation_config
from jaxrl.model.config_json import config_from_hf, hf_config
from jaxrl.model.folders import CONFIG, read_json, replaced_folder, together, write_json
from jaxrl.model.placement import load_parameter, on_mesh, whole_tensor
from jaxrl.model.spec import ParamSpec, shardings
from jaxrl.model.tensor_files import (
    INDEX,
    TYPES,
    Headers,
    file_name,
    plan_files,
    read_headers,
    read_tensor,
    several,
    write_index,
    write_tensors,
)
from jaxrl.model.transformer import Params, param_specs

TIED_HEAD, TIED_EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MAX_FILE_BYTES = 5_000_000_000
"""Tensor bytes in one file of an export unless another limit is asked for."""

OnBytes = Callable[[str, int, int], None]
"""Told how far a transfer is: what is done to the bytes ("read", "written", "read back"), bytes done, bytes in all."""

Keep = Callable[[tuple[str, ...], jax.Array], Any]
"""Makes of a parameter, named by its key in the tree, what shall be kept of it."""

FlatSpecs = dict[tuple[str, ...], ParamSpec]
FlatParams = dict[tuple[str, ...], Any]


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export wrote and found when it read it back.

    Attributes:
        bytes: of all tensors.
        logit_difference: largest difference between the logits of the folder and those of the parameters.
    """

    tensors: int
    bytes: int
    files: int
    logit_difference: float


def ignore(what: str, done: int, total: int) -> None:
    """The ``OnBytes`` of whoever does not watch."""


def unchanged(key: tuple[str, ...], parameter: jax.Array) -> jax.Array:
    """The ``Keep`` of whoever wants the parameters."""
    return parameter


def read_config(path: str | os.PathLike[str], base: ModelConfig | None = None) -> ModelConfig:
    """The architecture of a folder; see ``config_json.config_from_hf``.

    Raises:
        ConfigError: no readable config.json in the folder, or a model that is not supported.
    """
    folder = pathlib.Path(path)
    document = read_json(folder / CONFIG)
    try:
        return config_from_hf(document, base)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error


def load_folder(
    path: str | os.PathLike[str],
    param_dtype: str | None = None,
    *,
    mesh: Mesh | None = None,
    rules: Rules = PARAM_RULES,
    on_bytes: OnBytes = ignore,
    keep: Keep = unchanged,
) -> tuple[ModelConfig, Params]:
    """The model in a Hugging Face folder.

    Args:
        path: folder with config.json and model.safetensors, or shards with model.safetensors.index.json.
        param_dtype: float32 or bfloat16, to which tensors are converted; None loses nothing: bfloat16 where all tensors
            are bfloat16, else float32.
        mesh: where the parameters shall rest; a tensor goes there before the next is read, and each process reads only
            what its devices hold. None leaves them on the host.
        rules: how they rest on ``mesh``.
        keep: given each parameter with its key before the next is read, returns what stands in its place.

    Returns:
        The architecture with ``param_dtype`` set, and the parameters, layers stacked: on ``mesh``, or as numpy arrays.

    Raises:
        ConfigError: a model that is not supported; a tensor missing, left over, of another shape or of another type.
            The message names the tensors with the shape wanted and the shape found.
    """
    folder = pathlib.Path(path)
    config, headers = read_config(folder), read_headers(folder)
    if param_dtype is None:
        param_dtype = "bfloat16" if {header.type for header in headers.values()} == {"BF16"} else "float32"
    config = dataclasses.replace(config, param_dtype=param_dtype)
    resting = flax.traverse_util.flatten_dict(shardings(param_specs(config), mesh, rules)) if mesh else {}
    return config, _load(folder, config, headers, resting, "read", on_bytes, keep)


def save_folder(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    generation: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_FILE_BYTES,
    also: Callable[[pathlib.Path], None] | None = None,
    on_bytes: OnBytes = ignore,
) -> Exported:
    """Write a folder that transformers loads: config.json, generation_config.json and safetensors.

    The folder takes its name when everything is on disk, and was read back with the same values and the same logits; if
    anything fails before, what stood at ``path`` is untouched. Reading back takes a second copy of the parameters,
    where the first rests. All processes that share the parameters call this together, with a ``path`` on a disk that
    they share; file n is written by process n modulo their number.

    Args:
        path: of the new folder. An empty folder or an export of jaxrl there is replaced, anything else refused.
        params: tree of ``param_specs(config)``, on the host or on devices, split in any way.
        bos_token_id, eos_token_id, pad_token_id: from the tokenizer.
        generation: generation_config.json of the model that this one was made from, which is kept, with
            ``eos_token_id`` among its ends. None asks for plain sampling (temperature 1, no truncation), as the policy
            was trained.
        dtype: float32, bfloat16 or float16; the type of the parameters when None.
        max_shard_bytes: tensor bytes in one file (a larger tensor has a file of its own).
        also: given the unfinished folder, writes more files into it (the tokenizer's).

    Raises:
        ConfigError: parameters that are not those of ``config``; values too large for ``dtype``; something at ``path``
            that is no export.
        OSError: the folder cannot be written, for example because the disk is full; or what is read back differs.
    """
    specs: FlatSpecs = flax.traverse_util.flatten_dict(param_specs(config))
    leaves: FlatParams = flax.traverse_util.flatten_dict(params)
    _check_params(specs, leaves)
    dtype = dtype or _export_type(leaves)
    if dtype not in TYPES.values():
        raise ConfigError(f"cannot export as {dtype!r}; choose one of {', '.join(TYPES.values())}")
    if dtype == "float16":
        _check_float16(specs, leaves)
    ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    document = hf_config(config, dtype=dtype, **ids)
    item_bytes = jnp.dtype(dtype).itemsize
    sizes = {name: math.prod(spec.hf_shape) * item_bytes for spec in specs.values() for name in spec.hf_names.values()}
    files, total = plan_files(sizes, max_shard_bytes), sum(sizes.values())
    with replaced_folder(path, needed_bytes=total, known_by=CONFIG) as staging:
        with together("write"):
            if jax.process_index() == 0:
                write_json(staging / CONFIG, document)
                write_json(staging / GENERATION_CONFIG, merged_generation_config(ids, generation))
                if len(files) > 1:
                    write_index(staging, files, parameters=total // item_bytes, total_bytes=total)
                if also is not None:
                    also(staging)
        _write_files(staging, specs, leaves, jnp.dtype(dtype), files, sizes, on_bytes)
        difference = _verify(staging, config, params, dtype, on_bytes)
    return Exported(len(sizes), total, len(files), difference)


def copy_folder(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    also: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Architecture and weights of a folder, byte for byte, in another; ``path`` and ``also`` as for ``save_folder``.

    Raises:
        ConfigError: ``source`` holds no weights, or something at ``path`` is no export.
        OSError: the folder cannot be written.
    """
    source = pathlib.Path(source)
    files = {header.file for header in read_headers(source).values()} | {source / CONFIG, source / INDEX}
    files = {file for file in files if file.is_file()}
    needed = sum(file.stat().st_size for file in files)
    with replaced_folder(path, needed_bytes=needed, known_by=CONFIG) as staging, together("write"):
        if jax.process_index() == 0:
            for file in files:
                shutil.copyfile(file, staging / file.name)
            if also is not None:
                also(staging)


def check_vocabulary(config: ModelConfig, tokenizer_size: int) -> None:
    """Refuse a model whose embedding has fewer rows than the tokenizer has pieces (more rows are common padding).

    Raises:
        ConfigError: naming both sizes.
    """
    if config.vocab_size < tokenizer_size:
        raise ConfigError(
            f"ModelConfig.vocab_size={config.vocab_size} is smaller than the tokenizer's {tokenizer_size} pieces; "
            "use the tokenizer that belongs to the model, or a model with a larger vocabulary"
        )


def _load(
    folder: pathlib.Path,
    config: ModelConfig,
    headers: Headers,
    resting: Mapping[tuple[str, ...], NamedSharding],
    what: str,
    on_bytes: OnBytes,
    keep: Keep = unchanged,
) -> Params:
    """The parameters with the shardings in ``resting``, or as numpy arrays where that is empty."""
    specs: FlatSpecs = flax.traverse_util.flatten_dict(param_specs(config))
    _check_tensors(folder, config, headers, list(specs.values()))
    total = sum(headers[name].bytes for spec in specs.values() for name in spec.hf_names.values())
    done = 0

    def arrived(names: Iterable[str]) -> None:
        nonlocal done
        done += sum(headers[name].bytes for name in names)
        on_bytes(what, done, total)

    params: FlatParams = {}
    for key, spec in specs.items():
        if resting:
            params[key] = keep(key, load_parameter(spec, resting[key], headers, arrived))
            continue
        parameter = np.empty(spec.shape, spec.dtype)
        for place, name in spec.hf_names.items():
            parameter[place] = spec.from_hf(read_tensor(name, headers[name]))
            arrived([name])
        params[key] = keep(key, parameter)
    return flax.traverse_util.unflatten_dict(params)


def _check_tensors(folder: pathlib.Path, config: ModelConfig, headers: Headers, specs: list[ParamSpec]) -> None:
    """Compare what is there with what the architecture needs."""
    wanted = {name: spec.hf_shape for spec in specs for name in spec.hf_names.values()}
    spare = {TIED_HEAD} if config.tie_embeddings else set()  # some folders of tied models hold the head as well
    problems = {
        "missing tensors": [f"{name} {shape}" for name, shape in wanted.items() if name not in headers],
        "tensors of another model": [
            f"{name} {header.shape}" for name, header in headers.items() if name not in wanted and name not in spare
        ],
        "wrong shapes": [
            f"{name} is {headers[name].shape}, wanted {shape}"
            for name, shape in wanted.items()
            if name in headers and headers[name].shape != shape
        ],
        f"types other than {', '.join(TYPES)}": [
            f"{name} is {header.type}" for name, header in headers.items() if header.type not in TYPES
        ],
    }
    found = "; ".join(f"{title}: {several(names)}" for title, names in problems.items() if names)
    if found:
        raise ConfigError(
            f"{folder} does not hold the {config.family} that its config.json describes; {found}. "
            "Check that config.json and the weights belong together and are complete"
        )
    if config.tie_embeddings and TIED_HEAD in headers and not _equal(headers, TIED_HEAD, TIED_EMBEDDING):
        raise ConfigError(
            f"{folder} has tie_word_embeddings=true, but {TIED_HEAD} differs from {TIED_EMBEDDING}; set it to false"
        )


def _equal(headers: Headers, left: str, right: str, rows: int = 4096) -> bool:
    """Whether two tensors have the same values, read so many rows at a time."""
    if headers[left].shape != headers[right].shape:
        return False
    length = headers[left].shape[0]
    parts = ((slice(start, min(start + rows, length)),) for start in range(0, length, rows))
    return all(np.array_equal(*(read_tensor(name, headers[name], part) for name in (left, right))) for part in parts)


def _check_params(specs: FlatSpecs, leaves: FlatParams) -> None:
    found = {"/".join(key): tuple(leaf.shape) for key, leaf in leaves.items()}
    wanted = {"/".join(key): tuple(spec.shape) for key, spec in specs.items()}
    different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if different:
        lines = [f"{key} is {found.get(key, 'missing')}, wanted {wanted.get(key, 'none')}" for key in different]
        raise ConfigError(f"the parameters are not those of this ModelConfig: {several(lines)}")


def _check_float16(specs: FlatSpecs, leaves: FlatParams) -> None:
    """Refuse finite values that become infinite; before anything is written, and in all processes alike."""

    @jax.jit
    def overflows(leaf: jax.Array) -> jax.Array:
        return jnp.any(jnp.isfinite(leaf) & ~jnp.isfinite(leaf.astype(jnp.float16)))

    for key, leaf in leaves.items():
        if overflows(leaf):
            raise ConfigError(
                f"{specs[key].hf_name} has values above {np.finfo(np.float16).max}, the largest float16; "
                "export as bfloat16"
            )


def _export_type(leaves: FlatParams) -> str:
    types = {str(jnp.dtype(leaf.dtype)) for leaf in leaves.values()}
    return types.pop() if len(types) == 1 else "float32"


def _write_files(
    folder: pathlib.Path,
    specs: FlatSpecs,
    leaves: FlatParams,
    dtype: np.dtype,
    files: list[list[str]],
    sizes: dict[str, int],
    on_bytes: OnBytes,
) -> None:
    """Every file by the process it falls to. All processes fetch every tensor, because fetching takes all of them.

    Whatever can fail in one process alone comes after the last tensor of a file was fetched, and before all meet again:
    a process that left between two fetches would leave the others waiting for it.
    """
    places = {name: (key, place) for key, spec in specs.items() for place, name in spec.hf_names.items()}
    done = 0
    for number, names in enumerate(files):
        own = number % jax.process_count() == jax.process_index()
        with together("write"):
            tensors = {}
            for name in names:
                key, place = places[name]
                tensor = whole_tensor(specs[key], leaves[key], place)
                if own:
                    tensors[name] = tensor
            for name, tensor in tensors.items():
                tensors[name] = tensor.astype(dtype, copy=False)
            if own:
                file = folder / file_name(number, len(files))
                write_tensors(file, tensors)
                shutil.copymode(folder / CONFIG, file)  # the library makes it 0600
            done += sum(sizes[name] for name in names)
            on_bytes("written", done, sum(sizes.values()))


def _verify(folder: pathlib.Path, config: ModelConfig, params: Params, dtype: str, on_bytes: OnBytes) -> float:
    """Read an export back; returns the largest difference of its logits from those of the parameters.

    Raises:
        OSError: a value or a logit differs.
    """
    leaves = flax.traverse_util.flatten_dict(params)
    resting = {key: leaf.sharding for key, leaf in leaves.items() if on_mesh(leaf)}
    mesh = next((sharding.mesh for sharding in resting.values()), None)
    with together("read back"):
        found_config = read_config(folder, base=config)
        found = _load(folder, found_config, read_headers(folder), resting, "read back", on_bytes)
    try:
        compare.check_same_values(params, found, dtype)
        return compare.check_same_logits(config, params, found_config, found, dtype, mesh)
    except compare.Different as error:
        raise OSError(f"{folder} was written, but {error} there; nothing was kept: write it again") from error
