"""Named tensors in safetensors files, one file or shards with an index; knows nothing of models.

Headers are read when a folder is opened, a tensor's bytes when they are asked for, and then only those of the slice.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxrl.config import ConfigError
from jaxrl.model.folders import read_json, write_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types that are read and written, by their safetensors name."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of a tensor. ``type`` is safetensors' name, which need not be in ``TYPES``."""

    file: pathlib.Path
    shape: tuple[int, ...]
    type: str

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype(TYPES[self.type])

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Headers = Mapping[str, Header]
"""By the name of the tensor."""


def read_headers(folder: pathlib.Path) -> Headers:
    """Every tensor of a folder.

    Raises:
        ConfigError: no safetensors; a file that is damaged, cut off, missing, or a shard of another set; a tensor that
            is in two files, or in none although the index names it.
    """
    if (folder / WEIGHTS).is_file():
        listed: dict[str, str] = {}
        files = [WEIGHTS]
    elif (folder / INDEX).is_file():
        listed = _weight_map(folder)
        files = sorted(set(listed.values()))
        _check_files(folder, files)
    else:
        raise ConfigError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; only safetensors are read: convert the weights first"
        )
    headers: dict[str, Header] = {}
    for file in files:
        for name, header in _file_headers(folder / file).items():
            if name in headers:
                raise ConfigError(f"{folder}: tensor {name} stands in two files; remove one")
            headers[name] = header
    absent = sorted(set(listed) - set(headers))
    if absent:
        raise ConfigError(f"{folder / INDEX} names {several(absent)}, in no file; fetch the shards again")
    return headers


def read_tensor(name: str, header: Header, index: tuple[slice, ...] = ()) -> np.ndarray:
    """A tensor, or a slice of it.

    The file is mapped for this one call: its pages count as this process's memory for as long as they are mapped.

    Raises:
        ConfigError: the file was damaged after its header was read.
    """
    try:
        with safetensors.safe_open(header.file, "numpy") as opened:
            return opened.get_slice(name)[index] if index else opened.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{header.file} is damaged ({error}); fetch it again") from error


def plan_files(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in their order, cut into files of at most ``max_bytes``; a larger tensor has a file of its own."""
    files: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if size > room and files[-1]:
            files.append([])
            room = max_bytes
        files[-1].append(name)
        room -= size
    return files


def file_name(index: int, count: int) -> str:
    """The name that readers expect of file ``index`` of ``count``."""
    return WEIGHTS if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_tensors(file: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Write one file, readable as any other file of its folder.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    try:
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"{file} was not written: {error}") from error
    with open(file, "rb") as written:
        os.fsync(written.fileno())


def write_index(folder: pathlib.Path, files: Sequence[Sequence[str]], parameters: int, total_bytes: int) -> None:
    """Write which tensor is in which file, where there are several."""
    weight_map = {name: file_name(number, len(files)) for number, names in enumerate(files) for name in names}
    metadata = {"total_size": total_bytes, "total_parameters": parameters}
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def several(names: Sequence[str], shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _weight_map(folder: pathlib.Path) -> dict[str, str]:
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise ConfigError(f"{folder / INDEX} has no weight_map from tensors to files; fetch it again")
    outside = sorted({file for file in listed.values() if pathlib.PurePath(file).name != file})
    if outside:
        raise ConfigError(f"{folder / INDEX} names {several(outside)}, outside its folder; fetch it again")
    return listed


def _check_files(folder: pathlib.Path, named: list[str]) -> None:
    """Compare the shards that are there with those that the index names."""
    missing = [file for file in named if not (folder / file).is_file()]
    surplus = sorted(file.name for file in folder.glob("model-*-of-*.safetensors") if file.name not in named)
    if missing:
        raise ConfigError(
            f"{folder / INDEX} names {len(named)} files, but {several(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not there; fetch what is missing"
        )
    if surplus:
        raise ConfigError(
            f"{folder} has {several(surplus)}, which {INDEX} does not name; remove shards of another model, "
            "or fetch the index that belongs to them"
        )


def _file_headers(file: pathlib.Path) -> dict[str, Header]:
    try:
        with safetensors.safe_open(file, "numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            return {name: Header(file, tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    except safetensors.SafetensorError as error:
        raise ConfigError(f"{file} is damaged ({error}); fetch it again") from error
