"""The literal strings of the wire format: ChatML control tokens and the tags of rStar2-Agent (arXiv 2508.20722)."""

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PAD = "<|endoftext|>"
CONTROL_TOKENS = (PAD, TURN_START, TURN_END)

REASON_OPEN, REASON_CLOSE = "<reason>", "</reason>"
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<tool_response>", "</tool_response>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
TAGS = (
    REASON_OPEN, REASON_CLOSE, CALL_OPEN, CALL_CLOSE, RESPONSE_OPEN, RESPONSE_CLOSE, ANSWER_OPEN, ANSWER_CLOSE,
)  # fmt: skip
