"""Folders of safetensors: cut into files by size, read without loss, and refused by name when something is wrong."""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import ConfigError
from jaxrl.model import tensor_files
from jaxrl.model.tensor_files import INDEX, file_name, plan_files, read_headers, read_tensor, write_index, write_tensors

NAMES = [f"layer.{index}" for index in range(6)]


def write_shards(folder: pathlib.Path) -> None:
    """Six tensors in three files."""
    files = plan_files(dict.fromkeys(NAMES, 48), 96)
    for number, names in enumerate(files):
        tensors = {name: np.full((3, 4), NAMES.index(name), np.float32) for name in names}
        write_tensors(folder / file_name(number, 3), tensors)
    write_index(folder, files, parameters=72, total_bytes=288)


def shard(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / file_name(number, 3)


def write_raw(file: pathlib.Path, kind: str, item_bytes: int) -> None:
    """A file with one tensor of a type that numpy may not know."""
    header = json.dumps({"odd": {"dtype": kind, "shape": [2, 2], "data_offsets": [0, 4 * item_bytes]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * item_bytes))


@hypothesis.given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30), limit=st.integers(1, 100))
def test_files_keep_the_order_and_the_limit(sizes: list[int], limit: int) -> None:
    named = {f"t{index}": size for index, size in enumerate(sizes)}
    files = plan_files(named, limit)
    assert [name for names in files for name in names] == list(named)
    totals = [sum(named[name] for name in names) for names in files]
    assert all(total <= limit or len(names) == 1 for total, names in zip(totals, files, strict=True))
    # No file could have taken the first tensor of the next one.
    assert all(total + named[after[0]] > limit for total, after in zip(totals, files[1:], strict=False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_slices_are_those_of_the_tensor(dtype: str, tmp_path: pathlib.Path) -> None:
    tensor = np.arange(35, dtype=np.float32).reshape(5, 7).astype(jnp.dtype(dtype))
    write_tensors(tmp_path / tensor_files.WEIGHTS, {"t": tensor})
    header = read_headers(tmp_path)["t"]
    assert (header.shape, header.dtype, header.bytes) == ((5, 7), tensor.dtype, tensor.nbytes)
    for index in ((), (slice(1, 4), slice(None)), (slice(None), slice(2, 3)), (slice(4, 5), slice(0, 7))):
        found = read_tensor("t", header, index)
        assert found.dtype == tensor.dtype and found.tobytes() == tensor[index].tobytes()


def test_a_folder_without_faults_is_read(tmp_path: pathlib.Path) -> None:
    write_shards(tmp_path)
    headers = read_headers(tmp_path)
    assert [read_tensor(name, headers[name])[0, 0] for name in NAMES] == list(range(6))
    (tmp_path / "consolidated.safetensors").write_bytes(b"another form of the same weights, as some publish")
    assert read_headers(tmp_path) == headers


def set_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[pathlib.Path], None]:
    def spoil(folder: pathlib.Path) -> None:
        document = json.loads((folder / INDEX).read_text())
        change(document)
        (folder / INDEX).write_text(json.dumps(document))

    return spoil


def cut(bytes_left: int | None, bytes_off: int = 0) -> Callable[[pathlib.Path], None]:
    def spoil(folder: pathlib.Path) -> None:
        content = shard(folder, 1).read_bytes()
        shard(folder, 1).write_bytes(content[:bytes_left] if bytes_left is not None else content[:-bytes_off])

    return spoil


def lose(*numbers: int) -> Callable[[pathlib.Path], None]:
    return lambda folder: [shard(folder, number).unlink() for number in numbers] and None


SECOND = re.escape(file_name(1, 3))
DAMAGED = rf"{SECOND} is damaged \(.+\); fetch it again"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose(1), rf"index.json names 3 files, but {SECOND} is not there; fetch what is missing"),
        (lose(1, 2), rf"names 3 files, but {SECOND}, {re.escape(file_name(2, 3))} are not there; fetch"),
        (
            set_index(lambda document: [document["weight_map"].pop(name) for name in NAMES[2:4]]),
            rf"has {SECOND}, which model.safetensors.index.json does not name; remove shards of another model",
        ),
        (lambda folder: write_raw(folder / file_name(6, 7), "F32", 4), r"has model-00007-of-00007.*does not name"),
        (set_index(lambda document: document["weight_map"].update(lost=file_name(0, 3))), r"names lost, in no file"),
        (set_index(lambda document: document.pop("weight_map")), r"index.json has no weight_map from tensors to files"),
        (set_index(lambda document: document.update(weight_map=[1])), r"index.json has no weight_map"),
        (set_index(lambda document: document.update(weight_map={"a": 1})), r"index.json has no weight_map"),
        (set_index(lambda document: document["weight_map"].update(a="../x")), r"names ../x, outside its folder; fetch"),
        (lambda folder: (folder / INDEX).write_text("{"), r"index.json is no JSON: .*; fetch it again"),
        (lambda folder: (folder / INDEX).unlink(), r"has neither model.safetensors nor .*convert the weights first"),
        (
            lambda folder: shard(folder, 1).write_bytes(shard(folder, 0).read_bytes()),
            r"tensor layer.0 stands in two files; remove one",
        ),
        (cut(0), DAMAGED),
        (cut(1), DAMAGED),
        (cut(30), DAMAGED),
        (cut(None, bytes_off=1), DAMAGED),
        (cut(None, bytes_off=96), DAMAGED),
    ],
)
def test_every_fault_is_named(spoil: Callable[[pathlib.Path], None], message: str, tmp_path: pathlib.Path) -> None:
    write_shards(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_headers(tmp_path)


def test_a_file_that_is_cut_off_later_is_damaged_too(tmp_path: pathlib.Path) -> None:
    write_shards(tmp_path)
    headers = read_headers(tmp_path)
    cut(None, bytes_off=1)(tmp_path)
    with pytest.raises(ConfigError, match=DAMAGED):
        read_tensor(NAMES[2], headers[NAMES[2]])


@pytest.mark.parametrize(("kind", "item_bytes"), [("F8_E4M3", 1), ("F8_E5M2", 1), ("I64", 8), ("F64", 8), ("BOOL", 1)])
def test_headers_tell_types_that_are_not_read(kind: str, item_bytes: int, tmp_path: pathlib.Path) -> None:
    write_raw(tmp_path / tensor_files.WEIGHTS, kind, item_bytes)
    header = read_headers(tmp_path)["odd"]
    assert header.type == kind and kind not in tensor_files.TYPES


def test_a_file_that_cannot_be_written_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(OSError, match=r"absent/model.safetensors was not written: "):
        write_tensors(tmp_path / "absent" / "model.safetensors", {"t": np.zeros(3, np.float32)})
