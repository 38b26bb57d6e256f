"""Which calls a warden is running, in memory that the pool can still read when the warden has been killed.

A call that was running may have been what killed it and has used up a try; one that was waiting has not.
"""

import mmap
import os
from array import array

_ID = array("Q").itemsize


class Board:
    """Call ids by place; 0 where a place is free.

    Args:
        descriptor: of the memory that pool and warden share; not needed once this is made.
        places: calls that run at once at most.
    """

    def __init__(self, descriptor: int, places: int) -> None:
        self._memory = mmap.mmap(descriptor, places * _ID)
        self._ids = memoryview(self._memory).cast("Q")
        self._free = list(range(places))

    def enter(self, id: int) -> int:
        """Note that a call runs; returns its place."""
        place = self._free.pop()
        self._ids[place] = id
        return place

    def leave(self, place: int) -> None:
        self._ids[place] = 0
        self._free.append(place)

    def running(self) -> set[int]:
        return {id for id in self._ids if id}

    def close(self) -> None:
        self._ids.release()
        self._memory.close()


def shared_memory(places: int) -> int:
    """A descriptor of memory for so many places; the caller closes it."""
    descriptor = os.memfd_create("calls", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, places * _ID)
    return descriptor
