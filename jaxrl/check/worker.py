"""The process that compiles: one configuration, one target, a few programs. It reads a request and writes answers.

It is a process of its own because a compiler for devices that are not there is loaded from a folder of its own, which
the process that asks must not see, and so that the memory the compiler takes is given back.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

import jax

from jaxrl.check import collectives, devices, flops, programs, targets
from jaxrl.config import ConfigError, parse

READING = 3
"""Raised when what is read of a compiled program, and how, changes: what was kept before is then not used."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said of one program; bytes are those of one device.

    Attributes:
        arguments: bytes of what it is given.
        results: bytes of what it makes, beyond what it writes over its arguments.
        temporary: bytes it needs while it runs.
        flops: of its matrix products, all devices together.
        traffic: what it sends.
        refused: why it was not compiled; empty where it was. ``temporary`` is then what the compiler asked for.
        effort: that it was compiled with; see ``compiled``.
    """

    arguments: int = 0
    results: int = 0
    temporary: int = 0
    flops: float = 0.0
    traffic: tuple[dict[str, Any], ...] = ()
    refused: str = ""
    effort: float = 0.0


def main() -> int:
    """Answer the request on standard input: one JSON object a line, the last one whole."""
    request = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print to standard output too

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        target = targets.Target(**request["target"])
        config = parse([request["config"]])
        found = devices.described(target)
        run = programs.shapes(config, found)
        run = dataclasses.replace(run, replica=devices.of_one_process(target, run.replica))
        limit, inner = devices.memory(target, found), devices.inner(target, found)
        resident = dataclasses.asdict(run.resident())
        batch, kernels = programs.batch_bytes(config, run.mesh), run.kernels()
        answer(resident=resident, memory=limit, devices=len(found), batch=batch, kernels=kernels)
        for name, traced in run.traced(request["programs"]).items():
            with jax.set_mesh(run.mesh_of(name)):
                lowered = traced.lower(lowering_platforms=devices.platforms(target))
            key = _key(lowered, target, request["effort"])
            cached = pathlib.Path(request["cache"]) / f"{key}.json" if request["cache"] else None
            result = (_cached(cached) if request["read"] else None) or dataclasses.asdict(
                compiled(lowered, inner, request["effort"])
            )
            result |= {"effort": request["effort"], "flops": flops.matrix_flops(traced.jaxpr, run.data(name))}
            if cached is not None:
                _keep(cached, result)
            answer(program=name, **result)
    except ConfigError as error:
        answer(config_error=str(error))
        return 2
    answer(done=True)
    return 0


def compiled(lowered: jax.stages.Lowered, inner: int, effort: float) -> Compiled:
    """Compile one program; a refusal for want of memory is a result too.

    Args:
        inner: devices of one slice or host.
        effort: of XLA to make a fast program, from -1 to 1; 0 is what training compiles with.
    """
    try:
        program = lowered.compile({"exec_time_optimization_effort": effort} if effort else None)
    except jax.errors.JaxRuntimeError as error:
        wanted = asked_for(str(error))
        if wanted is None:
            raise
        return Compiled(temporary=wanted, refused=str(error).splitlines()[0], effort=effort)
    memory = program.memory_analysis()
    sent = collectives.traffic(program.as_text(), inner)
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        results=max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        temporary=memory.temp_size_in_bytes + reserved_by_cudnn(lowered.as_text()),
        traffic=tuple(map(dataclasses.asdict, sent)),
        effort=effort,
    )


def reserved_by_cudnn(program: str) -> int:
    """Bytes that cuDNN's backward pass of attention may reserve when it runs, which is not known before: at most the
    gradients of queries in float32, as if each segment that there is room for were as long as a row.

    Args:
        program: StableHLO. The calls of a program follow each other, so that the largest counts.
    """
    calls = re.findall(
        r"@__cudnn\$fmha\w*Backward\(.* : \(tensor<\d+x\d+x\d+x(\d+)x\w+>.*?tensor<(\d+)x(\d+)x(\d+)xf32>", program
    )
    return max((4 * math.prod(map(int, call)) for call in calls), default=0)


def asked_for(message: str) -> int | None:
    """Bytes that a compiler found no room for, by its message; None if the message is about something else."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = [
        float(amount) * 1024 ** "KMGT".index(unit) * 1024
        for pattern in (r"Used (?:by program )?([\d.]+)([KMGT])", r"required for .*? \(([\d.]+)([KMGT])\)")
        for amount, unit in re.findall(pattern, message)
    ]
    return int(max(found)) if found else None


def _key(lowered: jax.stages.Lowered, target: targets.Target, effort: float) -> str:
    """Name of what the compiler would say again: the program, the devices, and the versions of both compilers."""
    versions = (jax.__version__, devices.compiler_version(target))
    text = re.sub(r"loc\(.*?\)", "", lowered.as_text())
    whole = json.dumps([text, dataclasses.asdict(target), versions, os.environ.get("XLA_FLAGS", ""), effort])
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def _cached(path: pathlib.Path | None) -> dict[str, Any] | None:
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found.pop("reading") == READING else None
    except (ValueError, KeyError, AttributeError, TypeError):  # cut off, or not written here: as if it were not there
        return None


def _keep(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Write whole or not at all: other checks read and write the same folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
        json.dump(result | {"reading": READING}, file)
    os.replace(file.name, path)


if __name__ == "__main__":
    sys.exit(main())
