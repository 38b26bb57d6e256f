"""Folders with the compilers for TPUs and GPUs, and the processes that use them.

A compiler is a few packages beside jax. They are installed into a folder of their own in the user's cache, which only
the compiling process has on its path: everything else goes on as if they were not there, and jax and jaxrl are the very
ones that a run would use.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from jaxrl.config import ConfigError

COMPILERS = {"tpu": ("tpu", "libtpu"), "gpu": ("cuda13", "jax-cuda13-plugin")}
"""Platform -> the extra of jax that names the compiler's version, and its package."""


OTHERS = {"tpu": (), "gpu": ("nvidia-cuda-nvcc",)}
"""What a platform's compiler needs besides: the assembler of a GPU's instructions."""


class CompilerError(RuntimeError):
    """A compiler could not be installed, or failed."""


def cache_folder() -> pathlib.Path:
    """Where compilers and what they said are kept, by user."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "jaxrl" / "check"


def compiler_folder(platform: str) -> pathlib.Path:
    """Where the compiler of this platform belongs that fits the jax that is installed."""
    return cache_folder() / f"{platform}-jax-{importlib.metadata.version('jax')}"


def installed(platform: str) -> bool:
    """Whether the compiler is there, whole."""
    return platform == "this" or compiler_folder(platform).is_dir()


def requirements(platform: str) -> list[str]:
    """What has to be installed for a platform, in the versions that the installed jax asks for."""
    extra, package = COMPILERS[platform]
    for line in importlib.metadata.requires("jax") or ():
        match = re.match(rf"{package}(?:\[[\w-]+\])?\s*([^;\s]+)\s*;", line)
        if match and f'extra == "{extra}"' in line.replace("'", '"'):
            return [package + match[1], *OTHERS[platform]]
    raise CompilerError(f"jax {importlib.metadata.version('jax')} names no {package}; install jax 0.10 or 0.11")


def install(platform: str, say: Callable[[str], None]) -> pathlib.Path:
    """Install a compiler, whole or not at all; the folder it is in.

    Raises:
        CompilerError: pip failed; with what it said.
    """
    folder = compiler_folder(platform)
    if folder.is_dir():
        return folder
    wanted = requirements(platform)
    say(f"installing {', '.join(wanted)} (about 700 MB) into {folder} ...")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = tempfile.mkdtemp(prefix=f".{platform}-", dir=folder.parent)
    try:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--only-binary=:all:", "--target", staging, *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "pip failed").splitlines()[-1]
            raise CompilerError(f"cannot install {', '.join(wanted)}: {last}; is there a network, and pip?")
        os.rename(staging, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was quicker
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def ask(platform: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a compiling process answers to a request, as it answers; see ``worker``.

    Raises:
        ConfigError: the configuration cannot be used on the target.
        CompilerError: the process failed.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxrl.check.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=variables(platform),
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # it has died; its last words follow
                json.dump(request, stdin)
            done = False
            for line in process.stdout:
                answer = json.loads(line)
                if "config_error" in answer:
                    raise ConfigError(answer["config_error"])
                done = done or "done" in answer
                if "done" not in answer:
                    yield answer
            if process.wait() or not done:
                errors.seek(0)
                tail = "\n".join(errors.read().strip().splitlines()[-12:])
                raise CompilerError(f"the compiling process ended with code {process.returncode}:\n{tail}")
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def variables(platform: str) -> dict[str, str]:
    """Environment of a process that has the compiler of this platform, and its devices only by description."""
    path = [entry for entry in sys.path if entry]
    if platform == "this":
        return os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(compiler_folder(platform)), *path]),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is compiled for devices that are not there cannot be read back
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
