"""What a reward component sees."""

import dataclasses

from jaxrl.records import Trajectory


@dataclasses.dataclass(frozen=True)
class Graded:
    """A trajectory whose answer the verifier has looked at.

    Attributes:
        trajectory: its ``reward_status`` says whether it is correct; ``reward`` and ``components`` say nothing yet.
        max_response_tokens: what a response may have, tool output included.
        judgement: what the judge wrote about it; None where there is none, it was not asked, or it failed.
    """

    trajectory: Trajectory
    max_response_tokens: int
    judgement: str | None = None
