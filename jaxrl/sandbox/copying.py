"""Copies a working directory that a snippet has filled, without being led anywhere else by what lies in it."""

import os
import stat

_CHUNK = 1 << 20
_DEEPEST = 32  # folders within folders; more than that is refused


def copy_tree(source: int, target: int) -> None:
    """Copy folders, regular files (holes kept) and links, with modes and times; what is none of these is left out.

    Args:
        source: descriptor of the directory whose content is copied.
        target: descriptor of an empty one.

    Raises:
        OSError: the content does not fit, cannot be read, or is too deep.
    """
    _copy_folder(source, target, 0)


def _copy_folder(source: int, target: int, depth: int) -> None:
    if depth > _DEEPEST:
        raise OSError(f"folders nested deeper than {_DEEPEST}")
    with os.scandir(source) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        elif stat.S_ISREG(status.st_mode):
            _copy_file(name, source, target, status)
        elif stat.S_ISDIR(status.st_mode):
            os.mkdir(name, 0o700, dir_fd=target)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            inside, copy = os.open(name, flags, dir_fd=source), os.open(name, flags, dir_fd=target)
            try:
                _copy_folder(inside, copy, depth + 1)
                _copy_attributes(copy, status)
            finally:
                os.close(inside)
                os.close(copy)


def _copy_file(name: str, source: int, target: int, status: os.stat_result) -> None:
    reading = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=source)
    writing = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=target)
    try:
        size = os.fstat(reading).st_size
        os.ftruncate(writing, size)
        position = _next(reading, 0, os.SEEK_DATA, size)
        while position < size:
            end = _next(reading, position, os.SEEK_HOLE, size)
            while position < end:
                data = os.pread(reading, min(_CHUNK, end - position), position)
                if not data:
                    raise OSError(f"{name!r} changed while it was copied")
                position += os.pwrite(writing, data, position)
            position = _next(reading, end, os.SEEK_DATA, size)
        _copy_attributes(writing, status)
    finally:
        os.close(reading)
        os.close(writing)


def _next(file: int, position: int, kind: int, size: int) -> int:
    """Where the next data or hole begins; ``size`` where there is none."""
    try:
        return min(os.lseek(file, position, kind), size)
    except OSError:  # no data behind this position
        return size


def _copy_attributes(descriptor: int, status: os.stat_result) -> None:
    os.fchmod(descriptor, stat.S_IMODE(status.st_mode) & 0o777)
    os.utime(descriptor, ns=(status.st_atime_ns, status.st_mtime_ns))
