"""What a tool is to the episode driver."""

from typing import Any, Protocol

from jaxrl.records import ToolCall
from jaxrl.text.chat import ToolSchema


class Tool(Protocol):
    """Something the policy can call.

    Attributes:
        schema: name and arguments, as the policy is told of them.
    """

    schema: ToolSchema

    async def call(self, arguments: Any, seconds: float) -> ToolCall:
        """Run one call and say how it ended.

        Arguments that do not suit the tool end in ``BAD_ARGUMENTS`` with the reason in ``stderr``; a fault that is
        not the policy's doing in ``INFRA_ERROR``. Neither raises. Cancelling ends what the call started.

        Args:
            arguments: the JSON value that the policy wrote, whatever it is.
            seconds: execution time left; a call that runs longer is stopped and ends in ``TIMEOUT``. Time in a queue
                does not count and is reported in ``queue_seconds``.
        """
        ...
