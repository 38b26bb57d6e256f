"""How many descriptors a warden needs for its calls, and for how many sessions the others suffice."""

import resource

_OWN = 64  # stems, and what is open in passing
_PER_TEMPLATE = 18  # of both kinds and both jails, and their successors
_PER_CALL = 12  # pipes, pidfd, directory and control groups; or the copy that stands by for a cell
_PER_SESSION = 6  # socket, pipes, pidfd; socket and pidfd of its keeper
_FEWEST_SESSIONS = 4


def needed(workers: int, calls: int) -> int:
    """By a warden, whatever runs, with room for a few sessions.

    Args:
        workers: templates of each kind.
        calls: that run at once.
    """
    return _OWN + _PER_TEMPLATE * workers + _PER_CALL * calls + _PER_SESSION * _FEWEST_SESSIONS


def sessions(workers: int, calls: int) -> int:
    """How many sessions may have a process, under this process's limit."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        limit = 1 << 30
    return _FEWEST_SESSIONS + max(limit - needed(workers, calls), 0) // _PER_SESSION
