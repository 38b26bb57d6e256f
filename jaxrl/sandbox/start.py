"""What the processes that run snippets, a call's and a session's, have in common on their way there."""

import os

PENDING_SIGNALS = 256  # queued signals and timers; set before the user namespace, it would bound all calls together
leave = os._exit  # a snippet may replace the name in its place


def take_descriptors(*descriptors: int) -> None:
    """These become 1, 2, 3 and so on; what is there now is closed."""
    for number, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, number)
