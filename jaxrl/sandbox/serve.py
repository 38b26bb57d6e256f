"""``jaxrl sandbox serve``: its options, and what they mean. Loads the web library and the pool only to serve."""

import argparse
import asyncio
import dataclasses
import os
import pathlib
import sys
from typing import TYPE_CHECKING

from jaxrl.sandbox import loopback
from jaxrl.sandbox.protocol import Limits

if TYPE_CHECKING:
    from jaxrl.sandbox import Pool
    from jaxrl.sandbox.server import ServerSettings

EXAMPLES = """examples:
  jaxrl sandbox serve
  jaxrl sandbox serve --host 0.0.0.0 --token-file tokens --slots 16 --workers 4
  curl -H 'Content-Type: application/json' -d '{"code": "6 * 7"}' http://127.0.0.1:8780/v1/run"""

TOKEN_VARIABLE = "JAXRL_SANDBOX_TOKEN"
_DONE, _FAILED, _BAD_USAGE = 0, 1, 2


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8780, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--token-file",
        type=pathlib.Path,
        help=f"a token a line, each a tenant of its own; or one token in {TOKEN_VARIABLE}. Needed beyond loopback",
    )
    whole = {
        "workers": (2, "template processes of each kind"),
        "slots": (4, "calls that run at once"),
        "slow-slots": (8, "further calls that may run on once they have lasted a quarter second"),
        "queue": (4096, "calls under way at once, running or waiting; then 429"),
        "queue-mib": (512, "and their requests together"),
        "body-mib": (32, "one request"),
        "drain-seconds": (30, "how long SIGTERM lets calls under way go on"),
        "sessions": (256, "sessions open at once; then 429"),
        "token-sessions": (0, "and those of one token; 0 is as many as there may be"),
        "session-idle-seconds": (600, "a session that is not used for so long is ended"),
        "session-mib": (64, "code and files that the cells of one session may be given"),
        "session-memory-mib": (4096, "live sessions together; beyond, those unused for longest lose their processes"),
    }
    for name, (default, words) in whole.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{words} (default: %(default)s)")
    for limit in dataclasses.fields(Limits):
        parser.add_argument(
            f"--{limit.name.replace('_', '-')}",
            type=limit.type,
            default=limit.default,
            help="limit of a call, and the most that one may ask for (default: %(default)s)",
        )
    parser.add_argument(
        "--preload",
        default="numpy,scipy,sympy",
        help='modules that templates hold ready; "" for none (default: %(default)s)',
    )
    parser.add_argument(
        "--processes-without-cgroup",
        action="store_true",
        help="run other languages, and Python with processes, also where no memory cgroup is had: --memory-mib then "
        "bounds each process, not all of a call together",
    )
    parser.add_argument("--unsafe-sandbox", action="store_true", help="run code without isolation")


def main(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code."""
    try:
        from jaxrl.sandbox import server
    except ImportError as error:
        return _complain(f"{error.name} is missing; install it with: pip install 'jaxrl[serve]'", _BAD_USAGE)
    from jaxrl.sandbox import SandboxUnavailable

    try:
        settings = _settings(options, server.ServerSettings)
        pool = _pool(options)
    except ValueError as error:
        return _complain(str(error), _BAD_USAGE)
    try:
        asyncio.run(server.serve(pool, settings, options.host, options.port, options.drain_seconds, _announce))
    except (SandboxUnavailable, OSError) as error:
        return _complain(str(error), _FAILED)
    return _DONE


def _settings(options: argparse.Namespace, kind: "type[ServerSettings]") -> "ServerSettings":
    tokens = _tokens(options.token_file)
    if not tokens and not loopback.is_loopback(options.host):
        raise ValueError(
            f"--host {options.host} can be reached from other machines but there is no token; "
            f"give --token-file or {TOKEN_VARIABLE}, or bind to 127.0.0.1"
        )
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port {options.port} must lie between 0 and 65535")
    for name in ("queue", "queue_mib", "body_mib", "sessions", "session_idle_seconds", "session_mib"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    if options.token_sessions < 0:
        raise ValueError(f"--token-sessions {options.token_sessions} must not be negative; 0 is as many as --sessions")
    if options.drain_seconds < 0:
        raise ValueError(f"--drain-seconds {options.drain_seconds} must not be negative; 0 ends calls at once")
    return kind(
        tokens=tokens,
        calls=options.queue,
        body_bytes=options.body_mib << 20,
        waiting_bytes=options.queue_mib << 20,
        width=2 * (options.slots + options.slow_slots),
        sessions=options.sessions,
        token_sessions=options.token_sessions or options.sessions,
        idle_seconds=options.session_idle_seconds,
        history_bytes=options.session_mib << 20,
    )


def _pool(options: argparse.Namespace) -> "Pool":
    from jaxrl.sandbox import Pool

    return Pool(
        Limits(**{limit.name: getattr(options, limit.name) for limit in dataclasses.fields(Limits)}),
        workers=options.workers,
        slots=options.slots,
        slow_slots=options.slow_slots,
        queue=options.queue,
        preload=tuple(filter(None, options.preload.split(","))),
        unsafe=options.unsafe_sandbox,
        processes_without_cgroup=options.processes_without_cgroup,
        session_memory_mib=options.session_memory_mib,
    )


def _tokens(path: pathlib.Path | None) -> tuple[str, ...]:
    """The tokens that open the server; none where none are asked for."""
    if path is None:
        return tuple(filter(None, [os.environ.get(TOKEN_VARIABLE, "")]))
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--token-file {path} cannot be read: {error}") from error
    if not lines:
        raise ValueError(f"--token-file {path} holds no token; write one a line")
    if any(len(line.split()) > 1 for line in lines):
        raise ValueError(f"--token-file {path} has white space within a line; write one token a line, remarks after #")
    return tuple(lines)


def _announce(url: str) -> None:
    print(f"listening on {url}", flush=True)


def _complain(text: str, code: int) -> int:
    print(f"jaxrl sandbox serve: {text}", file=sys.stderr)
    return code
