"""Run by test_placement.py with eight virtual devices: how much memory a folder takes on its way in and out.

``folder_memory.py SMALL FOLDER SCRATCH``: SMALL is a folder of the same architecture, to warm up on. Prints
a JSON line.
"""

import json
import pathlib
import re
import sys

import jax

from jaxrl.config import MeshConfig
from jaxrl.mesh import make_mesh
from jaxrl.model import hf


def status(field: str) -> int:
    """A line of the process's status, in bytes."""
    text = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE).group(1))


def main() -> None:
    small, folder, scratch = map(pathlib.Path, sys.argv[1:])
    mesh = make_mesh(MeshConfig())
    hf.save_folder(scratch / "small", *hf.load_folder(small, mesh=mesh))
    before = status("VmRSS")
    config, params = hf.load_folder(folder, mesh=mesh)
    peaks = {"read": status("VmHWM") - before}

    def watch(what: str, done: int, total: int) -> None:
        peaks[what] = status("VmHWM") - before

    largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    hf.save_folder(scratch / "copy", config, params, max_shard_bytes=largest, on_bytes=watch)
    print(json.dumps({"params": sum(leaf.nbytes for leaf in jax.tree.leaves(params)), "file": largest, **peaks}))


if __name__ == "__main__":
    main()
