"""The table of block sizes, a file of this package, which ``jaxrl bench kernels --tune`` measures and writes.

Sizes decide in which order sums are taken, so other sizes give other last bits, and processes that compile one program
together need the same ones. They are therefore a part of the code, as a version of it has them, and are read from
nowhere else: no folder of a user, no variable of the environment.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping

from jaxrl_kernels.choice import TPUS, say_once

FILE = pathlib.Path(__file__).with_name("block_sizes.json")


@dataclasses.dataclass(frozen=True, order=True)
class Key:
    """What sizes are for.

    Attributes:
        kernel: folder of the kernel.
        device: kind, as jax says it.
        head_width: H.
        page: tokens of a page; 0 where there are none.
    """

    kernel: str
    device: str
    head_width: int
    page: int = 0


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The most that a block may have; a kernel takes less where a shape has less, or memory is short.

    Attributes:
        rows: of scores: the queries of all heads that share a KV head.
        keys: looked at together.
        measured: when and with what; empty where sizes are only known to fit.
    """

    rows: int
    keys: int
    measured: str = ""


TYPES = {field.name: field.type for field in (*dataclasses.fields(Key), *dataclasses.fields(Sizes))}
"""Of what an entry of the file has."""
REMEDY = "`jaxrl bench kernels --tune --table FILE` writes one"


def read(path: pathlib.Path = FILE) -> dict[Key, Sizes]:
    """A table.

    Raises:
        ValueError: the file is no table; the message names it and the entry.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no table of block sizes, but no JSON: {error}; {REMEDY}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} is no table of block sizes, but a {type(entries).__name__}; {REMEDY}")
    table = {}
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != TYPES.keys():
            raise ValueError(f"{path} is no table of block sizes: {entry} has not {', '.join(TYPES)}; {REMEDY}")
        for name, kind in TYPES.items():
            least = 0 if name == "page" else 1
            if type(entry[name]) is not kind or (kind is int and entry[name] < least):
                limit = f"an integer of at least {least}" if kind is int else "a string"
                raise ValueError(f"{path} is no table of block sizes: {name} of {entry} is not {limit}; {REMEDY}")
        sizes = Sizes(entry["rows"], entry["keys"], entry["measured"])
        table[Key(entry["kernel"], entry["device"], entry["head_width"], entry["page"])] = sizes
    return table


def write(found: Mapping[Key, Sizes], path: pathlib.Path = FILE) -> None:
    """Put rows into a table, in place of those with the same key; a table that is not there begins as the package's.

    Raises:
        ValueError: the file is there and is no table.
        OSError: it cannot be written.
    """
    table = read(path if path.exists() else FILE) | dict(found)
    lines = [json.dumps(dataclasses.asdict(key) | dataclasses.asdict(table[key])) for key in sorted(table)]
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    os.replace(unfinished, path)


@functools.cache
def table() -> Mapping[Key, Sizes]:
    """The package's, as it was when it was first asked for."""
    return read()


def sizes_for(key: Key, otherwise: Sizes) -> Sizes:
    """Sizes from the package's table, or others, which is said once on a device that has some to measure: interpreted
    kernels ask for theirs on any."""
    if key in table() or not key.device.startswith(TPUS):
        return table().get(key, otherwise)
    pages = f" and pages of {key.page} tokens" if key.page else ""
    say_once(
        f"{key.kernel.replace('_', ' ')} has no block sizes for head width {key.head_width}{pages} on "
        f"{key.device!r}; takes {otherwise.rows} rows of scores by {otherwise.keys} keys at most, which fit but were "
        "not measured; `jaxrl bench kernels --tune` measures"
    )
    return otherwise
