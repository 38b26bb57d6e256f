"""Packets between the warden and its processes, over real sockets."""

import os
import socket
import threading

import pytest

from jaxrl.sandbox import orders


def test_the_warden_waits_for_no_packet() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    late = threading.Timer(2.0, theirs.send, [b"late"])  # one that waits after all gets this
    late.start()
    try:
        with pytest.raises(BlockingIOError):
            orders.receive_packet(ours, wait=False)
    finally:
        late.cancel()
        late.join()
    orders.send_packet(theirs, b"K", (theirs.fileno(),))
    data, (descriptor,) = orders.receive_packet(ours, wait=False)
    assert (data, os.get_inheritable(descriptor)) == (b"K", False)
    os.close(descriptor)
    theirs.close()
    assert orders.receive_packet(ours, wait=False) == (b"", [])
    ours.close()
