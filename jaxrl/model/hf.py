"""Import and export of Hugging Face folders: config.json and safetensors, single or sharded.

Which tensor is which parameter, and how it lies, is read from the parameter table (``ParamSpec.hf_name`` and
``hf_layout``). Both directions go tensor by tensor, and every tensor is accounted for.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxrl.config import ConfigError, ModelConfig
from jaxrl.model.config_json import config_from_hf, hf_config
from jaxrl.model.spec import ParamSpec
from jaxrl.model.transformer import Params, param_specs

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types that are read and written, by their safetensors name."""
TIED_HEAD, TIED_EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read_config(path: str | os.PathLike[str], base: ModelConfig | None = None) -> ModelConfig:
    """The architecture of a folder; see ``config_json.config_from_hf``.

    Raises:
        ConfigError: no readable config.json in the folder, or a model that is not supported.
    """
    folder = pathlib.Path(path)
    document = _read_json(folder / CONFIG)
    try:
        return config_from_hf(document, base)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error


def load_folder(path: str | os.PathLike[str], param_dtype: str | None = None) -> tuple[ModelConfig, Params]:
    """The model in a Hugging Face folder.

    Args:
        path: folder with config.json and model.safetensors, or shards with model.safetensors.index.json.
        param_dtype: float32 or bfloat16, to which tensors are converted; None loses nothing: bfloat16 where all tensors
            are bfloat16, else float32.

    Returns:
        The architecture with ``param_dtype`` set, and the parameters as numpy arrays, layers stacked.

    Raises:
        ConfigError: a model that is not supported; a tensor missing, left over, of another shape or of another type.
            The message names the tensors with the shape wanted and the shape found.
    """
    folder = pathlib.Path(path)
    config = read_config(folder)
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        types = {str(tensors[name].get_slice(name).get_dtype()) for name in tensors}
        if param_dtype is None:
            param_dtype = "bfloat16" if types == {"BF16"} else "float32"
        config = dataclasses.replace(config, param_dtype=param_dtype)
        specs = flax.traverse_util.flatten_dict(param_specs(config))
        _check_tensors(folder, config, tensors, list(specs.values()))
        params = {}
        for key, spec in specs.items():
            params[key] = np.empty(spec.shape, jnp.dtype(param_dtype))
            for name, layer in _hf_names(spec):
                params[key][layer] = spec.from_hf(tensors[name].get_tensor(name))
    return config, flax.traverse_util.unflatten_dict(params)


def save_folder(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    also: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Write a folder that transformers loads: config.json, generation_config.json and safetensors.

    The folder takes its name when everything is on disk; if anything fails before, what stood at ``path`` is untouched.
    generation_config.json asks for plain sampling (temperature 1, no truncation), as the policy was trained.

    Args:
        path: of the new folder. An empty folder or an earlier export there is replaced, anything else refused.
        params: tree of ``param_specs(config)``, on the host or on devices that this process sees.
        bos_token_id, eos_token_id, pad_token_id: from the tokenizer.
        dtype: float32, bfloat16 or float16; the type of the parameters when None.
        max_shard_bytes: tensor bytes in one file (a larger tensor has a file of its own).
        also: given the unfinished folder, writes more files into it (the tokenizer's).

    Raises:
        ConfigError: parameters that are not those of ``config``; something at ``path`` that is no export.
        OSError: the folder cannot be written, for example because the disk is full.
    """
    specs = flax.traverse_util.flatten_dict(param_specs(config))
    leaves = flax.traverse_util.flatten_dict(params)
    _check_params(specs, leaves)
    dtype = dtype or _export_type(leaves)
    if dtype not in TYPES.values():
        raise ConfigError(f"cannot export as {dtype!r}; choose one of {', '.join(TYPES.values())}")
    ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    document = hf_config(config, dtype=dtype, **ids)
    generation = {**ids, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    item_size = jnp.dtype(dtype).itemsize
    shards = _plan_shards(specs, item_size, max_shard_bytes)
    parameters = sum(math.prod(spec.shape) for spec in specs.values())
    with replaced_folder(path, needed_bytes=parameters * item_size) as staging:
        _write_json(staging / CONFIG, document)
        _write_json(staging / GENERATION_CONFIG, generation)
        _write_shards(staging, specs, leaves, jnp.dtype(dtype), shards)
        if len(shards) > 1:
            weight_map = {name: _shard_name(i, len(shards)) for i, shard in enumerate(shards) for _, name, _ in shard}
            metadata = {"total_size": parameters * item_size, "total_parameters": parameters}
            _write_json(staging / INDEX, {"metadata": metadata, "weight_map": weight_map})
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


@contextlib.contextmanager
def replaced_folder(path: str | os.PathLike[str], needed_bytes: int = 0) -> Iterator[pathlib.Path]:
    """A temporary sibling folder that takes the place of ``path`` when the block ends without an exception.

    On an exception it is removed and ``path`` stays as it was. A process killed in the block leaves the sibling, called
    ``.NAME.partial``, for the next writer to remove; killed between the two renames at the end, it leaves the former
    folder as ``.NAME.previous``, which the next writer puts back first.

    Args:
        path: an absent or empty folder, or an earlier export.
        needed_bytes: disk space without which the block is not even entered.

    Raises:
        ConfigError: something else stands at ``path``.
        OSError: not enough space, or a rename that failed.
    """
    target = pathlib.Path(path).absolute()
    staging, previous = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "previous"))
    target.parent.mkdir(parents=True, exist_ok=True)
    if previous.exists() and not target.exists():
        previous.rename(target)
    if target.exists() and not (target.is_dir() and ((target / CONFIG).is_file() or not any(target.iterdir()))):
        raise ConfigError(f"{target} exists and is no exported model; choose another path or remove it")
    for leftover in (staging, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes:
        raise OSError(
            f"{target} needs {needed_bytes} bytes but its disk has {free} free; make room or choose another path"
        )
    try:
        staging.mkdir()
        yield staging
        for file in [*staging.rglob("*"), staging]:
            _flush(file)
        if target.exists():
            target.rename(previous)  # a folder with content cannot be renamed over
        try:
            staging.rename(target)
        except BaseException:
            if previous.exists():
                previous.rename(target)
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _flush(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _hf_names(spec: ParamSpec) -> Iterator[tuple[str, Any]]:
    """The tensors that make up a parameter, each with the index of its place in the stacked array."""
    for place, name in spec.hf_names.items():
        yield name, place


def _open_tensors(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Every tensor name with the open file that holds it."""
    if (folder / WEIGHTS).is_file():
        files, listed = [WEIGHTS], None
    elif (folder / INDEX).is_file():
        listed = _read_json(folder / INDEX).get("weight_map", {})
        files = sorted(set(listed.values()))
    else:
        raise ConfigError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; only safetensors are read: convert the weights first"
        )
    tensors: dict[str, Any] = {}
    for file in files:
        if not (folder / file).is_file():
            raise ConfigError(f"{folder / INDEX} names {file}, which is not there; fetch the missing shard")
        try:
            opened = stack.enter_context(safetensors.safe_open(folder / file, "numpy"))
        except safetensors.SafetensorError as error:
            raise ConfigError(f"{folder / file} is damaged ({error}); fetch it again") from error
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            if name in tensors:
                raise ConfigError(f"{folder}: tensor {name} stands in two files; remove one")
            tensors[name] = opened
    absent = sorted(set(listed or ()) - set(tensors))
    if absent:
        raise ConfigError(f"{folder / INDEX} names {_several(absent)}, in no file; fetch the shards again")
    return tensors


def _check_tensors(folder: pathlib.Path, config: ModelConfig, tensors: dict[str, Any], specs: list[ParamSpec]) -> None:
    """Compare what is there with what the architecture needs."""
    wanted = {name: spec.hf_shape for spec in specs for name, _ in _hf_names(spec)}
    found = {name: tensors[name].get_slice(name) for name in tensors}
    missing = [f"{name} {shape}" for name, shape in wanted.items() if name not in found]
    extra = [f"{name} {tuple(part.get_shape())}" for name, part in found.items() if name not in wanted]
    misshaped = [
        f"{name} is {tuple(found[name].get_shape())}, wanted {shape}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].get_shape()) != shape
    ]
    if config.tie_embeddings and TIED_HEAD in found and TIED_HEAD not in wanted and not misshaped:
        extra = [name for name in extra if not name.startswith(f"{TIED_HEAD} ")]
        _check_tied(folder, tensors)
    mistyped = [f"{name} is {part.get_dtype()}" for name, part in found.items() if part.get_dtype() not in TYPES]
    problems = [
        f"{title}: {_several(names)}"
        for title, names in (
            ("missing tensors", missing),
            ("tensors of another model", extra),
            ("wrong shapes", misshaped),
            (f"types other than {', '.join(TYPES)}", mistyped),
        )
        if names
    ]
    if problems:
        raise ConfigError(
            f"{folder} does not hold the {config.family} that its config.json describes; {'; '.join(problems)}. "
            "Check that config.json and the weights belong together and are complete"
        )


def _check_tied(folder: pathlib.Path, tensors: dict[str, Any]) -> None:
    """Some folders of tied models hold the head as well; it must then be the embedding."""
    head, embedding = (tensors[name].get_tensor(name) for name in (TIED_HEAD, TIED_EMBEDDING))
    if not np.array_equal(head, embedding):
        raise ConfigError(
            f"{folder} has tie_word_embeddings=true, but {TIED_HEAD} differs from {TIED_EMBEDDING}; set it to false"
        )


def _check_params(specs: dict[Any, ParamSpec], leaves: dict[Any, Any]) -> None:
    found = {"/".join(key): tuple(leaf.shape) for key, leaf in leaves.items()}
    wanted = {"/".join(key): tuple(spec.shape) for key, spec in specs.items()}
    different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if different:
        lines = [f"{key} is {found.get(key, 'missing')}, wanted {wanted.get(key, 'none')}" for key in different]
        raise ConfigError(f"the parameters are not those of this ModelConfig: {_several(lines)}")


def _export_type(leaves: dict[Any, Any]) -> str:
    types = {str(jnp.dtype(leaf.dtype)) for leaf in leaves.values()}
    return types.pop() if len(types) == 1 else "float32"


Shard = list[tuple[Any, str, Any]]
"""Tensors of one file: key of the parameter, name in the file, place in the stacked array."""


def _plan_shards(specs: dict[Any, ParamSpec], item_size: int, max_shard_bytes: int) -> list[Shard]:
    """Fill files in the order of the table, so that each parameter is fetched from its device once or twice."""
    shards: list[Shard] = [[]]
    room = max_shard_bytes
    for key, spec in specs.items():
        size = math.prod(spec.hf_shape) * item_size
        for name, layer in _hf_names(spec):
            if size > room and shards[-1]:
                shards.append([])
                room = max_shard_bytes
            shards[-1].append((key, name, layer))
            room -= size
    return shards


def _shard_name(index: int, shards: int) -> str:
    return WEIGHTS if shards == 1 else f"model-{index + 1:05d}-of-{shards:05d}.safetensors"


def _write_shards(
    folder: pathlib.Path, specs: dict[Any, ParamSpec], leaves: dict[Any, Any], dtype: np.dtype, shards: list[Shard]
) -> None:
    fetched: dict[Any, np.ndarray] = {}  # the parameter last used, on the host
    for index, shard in enumerate(shards):
        tensors = {}
        for key, name, layer in shard:
            if key not in fetched:
                fetched = {key: np.asarray(leaves[key])}
            tensors[name] = _converted(name, specs[key].to_hf(fetched[key][layer]), dtype)
        try:
            safetensors.numpy.save_file(tensors, folder / _shard_name(index, len(shards)), metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"{folder / _shard_name(index, len(shards))} was not written: {error}") from error
        shutil.copymode(folder / CONFIG, folder / _shard_name(index, len(shards)))  # the library makes it 0600


def _converted(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        converted = tensor.astype(dtype, copy=False)
    if dtype == np.float16 and not np.array_equal(np.isfinite(converted), np.isfinite(tensor)):
        limit = np.finfo(np.float16).max
        raise ConfigError(f"{name} has values above {limit}, the largest float16; export as bfloat16")
    return converted


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file} is not there; give the path of a Hugging Face folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no JSON: {error}; fetch it again") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{file} holds no JSON object; fetch it again")
    return document


def _write_json(file: pathlib.Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _flush(path: pathlib.Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _several(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
