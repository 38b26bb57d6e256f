"""Languages other than Python: how their source becomes a running program, and what of the host that program sees.

Each runs in the jail for calls that may start processes. A language is a record, so a caller can bring its own.
"""

import dataclasses
import os
import sys

from jaxrl.sandbox import arguments, jail
from jaxrl.sandbox.protocol import Limits

# Programs, what compilers read, and the targets of links among them (Debian 13 keeps the kernel's headers apart).
_HEADERS = ("/usr/include", "/usr/lib/linux/uapi")
_FOLDERS = ("/usr/bin", "/bin", *_HEADERS, "/usr/lib/gcc", "/usr/libexec/gcc", "/etc/alternatives")
_FILES = ("/etc/ld.so.cache",)  # where the loader finds libraries outside its usual folders
_PROGRAM_FOLDERS = ("/usr/bin", "/bin")
_BUILD = Limits(cpu_seconds=30.0, wall_seconds=60.0, memory_mib=1024)


@dataclasses.dataclass(frozen=True)
class Language:
    """One language.

    Attributes:
        name: for messages.
        source: file in the working directory that holds the code.
        run: program and arguments that run it. The program is looked for in ``/usr/bin`` and beside the interpreter,
            unless it begins with ``./``: then it lies in the working directory.
        build: program and arguments that make ``program`` of the source first; empty where it is run as it is.
        program: file that ``build`` leaves.
        build_limits: of that step; the call's own limits are for the program alone.
    """

    name: str
    source: str
    run: tuple[str, ...]
    build: tuple[str, ...] = ()
    program: str = ""
    build_limits: Limits = _BUILD

    def __post_init__(self) -> None:
        arguments.kind("Language.name", self.name, str, "str")
        for field, words in (("run", self.run), ("build", self.build)):
            arguments.texts(f"Language.{field}", words)
        if not self.run:
            raise ValueError("Language.run=() must name a program; give it and its arguments, ('ruby', 'main.rb')")
        for field, file in (("source", self.source), ("program", self.program)):
            arguments.kind(f"Language.{field}", file, str, "str")
            if "/" in file or "\0" in file or file in (".", "..") or not (file or field == "program"):
                raise ValueError(f"Language.{field}={file!r} must be the name of a file, without folders")
        if self.build and not self.program:
            raise ValueError(f"Language.build={self.build} makes a file, but Language.program does not name it")
        arguments.kind("Language.build_limits", self.build_limits, Limits, "a sandbox.Limits")

    @property
    def own_files(self) -> frozenset[str]:
        """Names in the working directory that are ours, neither to be given nor returned."""
        return frozenset({self.source, self.program} - {""})

    def missing(self) -> str | None:
        """The first program that is not installed."""
        first_words = [words[0] for words in (self.build, self.run) if words and not words[0].startswith("./")]
        return next((name for name in first_words if locate(name) is None), None)


LANGUAGES = {
    "bash": Language("bash", "main.sh", ("bash", "main.sh")),
    "c++": Language(
        "c++",
        "main.cpp",
        run=("./main",),
        build=("g++", "-std=gnu++17", "-O2", "-o", "main", "main.cpp"),
        program="main",
    ),
}


def named(language: str | Language) -> Language:
    """The record of a language.

    Raises:
        ValueError: there is none of this name.
        SandboxUnavailable: one of its programs is not installed.
    """
    if isinstance(language, str) and language not in LANGUAGES:
        known = ", ".join(["python", *LANGUAGES])
        raise ValueError(f"language={language!r} is not known; choose one of {known}, or give a sandbox.Language")
    chosen = LANGUAGES[language] if isinstance(language, str) else language
    missing = chosen.missing()
    if missing is not None:
        places = ", ".join(search_path())
        raise jail.SandboxUnavailable(f"language {chosen.name!r} needs {missing!r}, not found in {places}: install it")
    return chosen


def interpreter() -> str:
    """Real path of the Python interpreter, outside of any virtual environment."""
    return os.path.realpath(sys.executable)


def search_path() -> tuple[str, ...]:
    """Folders in which programs are looked for."""
    return tuple(dict.fromkeys((os.path.dirname(interpreter()), *_PROGRAM_FOLDERS)))


def locate(name: str) -> str | None:
    """Path of a program; a path stays what it is; None where there is none."""
    if "/" in name:
        return name
    paths = (os.path.join(folder, name) for folder in search_path())
    return next((path for path in paths if os.access(path, os.X_OK)), None)


def command(words: tuple[str, ...]) -> str:
    """Program and arguments as a call carries them."""
    return "\0".join([locate(words[0]) or words[0], *words[1:]])


def plan_view(preload: tuple[str, ...], more: tuple[str, ...]) -> jail.View:
    """What a call that may start processes can see: as other calls, and the system's programs and headers.

    Args:
        preload: modules that Python must find.
        more: further folders.
    """
    view = jail.plan_view(preload, (*_FOLDERS, *more))
    files = [path for path in _FILES if os.path.isfile(path)]
    links = [("/bin", os.readlink("/bin"))] if os.path.islink("/bin") else []
    folder, name = os.path.split(interpreter())
    if folder not in view.folders:
        files.append(interpreter())
        links += [(os.path.join(folder, other), name) for other in {"python3", "python"} - {name}]
    known = (*view.folders, *(path for path, _ in (*view.links, *links)))
    for path in map(os.path.normpath, more):  # one that is reached by a link is to be found by that name too
        if path != os.path.realpath(path) and not any(jail.inside(path, other) for other in known):
            links.append((path, os.path.realpath(path)))
    return dataclasses.replace(view, files=tuple(files), links=(*view.links, *links), shared_memory=True)


def environment(view: jail.View) -> dict[str, str]:
    """What programs find in their environment, besides what every call does."""
    return {"PATH": ":".join(search_path()), "PYTHONPATH": ":".join(view.packages)}
