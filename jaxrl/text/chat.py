"""The form of a conversation: ChatML turns with Hermes tool calls, after rStar2-Agent (arXiv 2508.20722).

Append-only: a piece of the conversation is tokenised once, where it arises, and never again. The policy stops at
``<|im_end|>``; the newline that ChatML puts after it is written by the environment at the head of the next tool turn,
so that the trained stream is the rendered conversation token for token.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl.config import ChatConfig, ConfigError
from jaxrl.records import Conversation, Demonstration
from jaxrl.text.tokenizer import Tokenizer
from jaxrl.text.tokens import (
    CALL_CLOSE,
    CALL_OPEN,
    REASON_OPEN,
    RESPONSE_CLOSE,
    RESPONSE_OPEN,
    TURN_END,
    TURN_START,
)

_TOOLS_HEAD = "# Tools\n\nThese functions may be called, one signature a line:\n<tools>\n"
_TOOLS_TAIL = (
    "\n</tools>\n\nTo call one, write a JSON object with its name and arguments between the call tags:\n"
    f'{CALL_OPEN}{{"name": <name>, "arguments": <object>}}{CALL_CLOSE}'
)


@dataclasses.dataclass(frozen=True)
class ToolSchema:
    """What the policy is told of a tool. ``parameters`` is a JSON schema of an object."""

    name: str
    description: str
    parameters: dict[str, Any]

    def as_function(self) -> dict[str, Any]:
        """The schema in the form of OpenAI's function calling, which ``transformers`` chat templates take."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class ChatFormat:
    """Renders prompts, tool turns and whole demonstrations as token ids.

    The system text, the preamble and all framing are ours and are read with their special tokens; problems and tool
    outputs are foreign and are spelled out (see ``Tokenizer.encode``), so no text in them can end a turn.
    """

    def __init__(self, config: ChatConfig, tools: tuple[ToolSchema, ...], tokenizer: Tokenizer) -> None:
        self.config = config
        self.tools = tools
        self.tokenizer = tokenizer
        # The newline that ends a turn is split from the turn's header, so that a header is always the same ids.
        self._user_header = f"{TURN_START}user\n{config.preamble}"
        self._opening = f"{TURN_START}assistant\n" + (REASON_OPEN if config.open_reason else "")
        self._before_question = self._encode(self._system_turn(config.system) + self._user_header)
        self._before_next_question = self._encode(f"\n{self._user_header}")
        self._after_question = self._encode(f"{TURN_END}\n{self._opening}")
        self._before_outputs = self._encode(f"\n{TURN_START}user\n{RESPONSE_OPEN}\n")
        self._between_outputs = self._encode(f"\n{RESPONSE_CLOSE}\n{RESPONSE_OPEN}\n")
        self._after_outputs = self._encode(f"\n{RESPONSE_CLOSE}{TURN_END}\n{self._opening}")

    def prompt(self, question: str) -> np.ndarray:
        """Ids before the policy's first token: system and tools, the user's turn, the opened assistant turn.

        Returns:
            [prompt tokens] int32.
        """
        ids = [*self._before_question, *self.tokenizer.encode(question), *self._after_question]
        return np.asarray(ids, np.int32)

    def tool_turn(self, outputs: Sequence[Sequence[int]]) -> np.ndarray:
        """Ids the environment appends after the policy's ``<|im_end|>``: the newline that closes that turn, a user turn
        with one response block for each output, and the next opened assistant turn.

        Args:
            outputs: at least one output, as ids of ``Tokenizer.encode(text)``, cut to length.

        Returns:
            [appended tokens] int32; none of them is the policy's, so all are masked.

        Raises:
            ValueError: no outputs, or an output that holds a control token, which could end the turn.
        """
        if not outputs:
            raise ValueError("a tool turn needs at least one output; answer every call, if only with an error")
        ids = list(self._before_outputs)
        for index, output in enumerate(outputs):
            if not self.tokenizer.control_ids.isdisjoint(map(int, output)):
                raise ValueError(f"tool output {index} holds a control token; tokenise it with special=False")
            ids += [*(self._between_outputs if index else []), *map(int, output)]
        return np.asarray([*ids, *self._after_outputs], np.int32)

    def demonstration(
        self, demonstration: Demonstration, *, mask_failed: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """A whole worked conversation, exactly as the rollout would have laid it down.

        Args:
            mask_failed: leave policy turns whose call failed out of the mask.

        Returns:
            ids: [T] int32, prompt included.
            mask: [T] int8, 1 on what the policy writes, its ``<|im_end|>`` included.

        Raises:
            ValueError: the turns do not begin and end with the policy, or a policy turn holds a control token.
        """
        name, turns = demonstration.problem.id, demonstration.turns
        if len(turns) % 2 == 0:
            raise ValueError(f'demonstration "{name}" has {len(turns)} turns; they must begin and end with the policy')
        ids = self.prompt(demonstration.problem.question).tolist()
        mask = [0] * len(ids)
        for index, text in enumerate(turns):
            if index % 2:
                written, sampled = self.tool_turn([self.tokenizer.encode(text)]).tolist(), 0
            else:
                written = self._policy_turn(text, f'demonstration "{name}": policy turn {index}')
                sampled = int(not (mask_failed and index in demonstration.failed))
            ids += written
            mask += [sampled] * len(written)
        return np.asarray(ids, np.int32), np.asarray(mask, np.int8)

    def conversation(self, conversation: Conversation, *, mask_failed: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """A recorded conversation in this form, as ``template`` renders it; a system message takes the place of ours.

        Args:
            mask_failed: leave assistant messages whose call failed out of the mask.

        Returns:
            ids: [T] int32.
            mask: [T] int8, 1 on assistant messages that are ``learned``, their ``<|im_end|>`` included.

        Raises:
            ConfigError: an assistant message holds a ChatML control token.
        """
        messages, ids, mask = list(conversation.messages), [], []
        before = self._before_question
        if messages[0].role == "system":
            before = self._encode(self._system_turn(messages.pop(0).text) + self._user_header)
        outputs: list[list[int]] = []
        for index, message in enumerate(messages):
            learned = 0
            if message.role == "user":
                written = [*before, *self.tokenizer.encode(message.text), *self._after_question]
                before = self._before_next_question
            elif message.role == "tool":
                outputs.append(self.tokenizer.encode(message.text))
                if messages[index + 1].role == "tool":
                    continue
                written, outputs = self.tool_turn(outputs).tolist(), []
            else:
                written = self._policy_turn(message.text, f'conversation "{conversation.id}": message {index}')
                learned = int(message.learned and not (mask_failed and message.failed))
            ids += written
            mask += [learned] * len(written)
        return np.asarray(ids, np.int32), np.asarray(mask, np.int8)

    def template(self) -> str:
        """The same form as a Jinja chat template for ``transformers``.

        Without ``tools`` or a system message the ones of this format are used. An assistant message holds what the
        policy wrote; a tool message holds one output.
        """
        config = self.config
        replacements = {
            "SYSTEM": config.system,
            "TOOLS": self._tool_lines(),
            "TOOLS_HEAD": _TOOLS_HEAD,
            "TOOLS_TAIL": _TOOLS_TAIL,
            "PREAMBLE": config.preamble,
            "OPENED": REASON_OPEN if config.open_reason else "",
        }
        values = "".join(f"{{%- set {name} = {_jinja(text)} -%}}\n" for name, text in replacements.items())
        return values + _TEMPLATE

    def save(self, folder: str | pathlib.Path) -> None:
        """Write the tokenizer with this format as its chat template (see ``Tokenizer.save``)."""
        self.tokenizer.save(folder, chat_template=self.template())

    def _policy_turn(self, text: str, name: str) -> list[int]:
        """What the policy would write, with its ``<|im_end|>``."""
        written = self._encode(text)
        if not self.tokenizer.control_ids.isdisjoint(written):
            raise ConfigError(f"{name} holds a ChatML control token; remove it")
        return [*written, self.tokenizer.end_id]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, special=True)

    def _tool_lines(self) -> str:
        if not self.config.show_tools:
            return ""
        return "\n".join(json.dumps(tool.as_function(), ensure_ascii=False) for tool in self.tools)

    def _system_turn(self, system: str) -> str:
        lines = self._tool_lines()
        parts = [system, f"{_TOOLS_HEAD}{lines}{_TOOLS_TAIL}" if lines else ""]
        text = "\n\n".join(part for part in parts if part)
        return f"{TURN_START}system\n{text}{TURN_END}\n" if text else ""


def _jinja(text: str) -> str:
    """``text`` as a Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


_TEMPLATE = r"""
{%- if messages and messages[0].role == 'system' -%}
  {%- set SYSTEM = messages[0].content -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools -%}
  {%- set lines = namespace(text='') -%}
  {%- for tool in tools -%}
    {%- set lines.text = lines.text + ('' if loop.first else '\n') + (tool | tojson) -%}
  {%- endfor -%}
  {%- set TOOLS = lines.text -%}
{%- endif -%}
{%- if SYSTEM or TOOLS -%}
  {{- '<|im_start|>system\n' + SYSTEM -}}
  {%- if TOOLS -%}{{- ('\n\n' if SYSTEM else '') + TOOLS_HEAD + TOOLS + TOOLS_TAIL -}}{%- endif -%}
  {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
  {%- elif message.role == 'assistant' -%}
    {{- '<|im_start|>assistant\n' + OPENED + (message.content or '') -}}
    {%- for call in message.tool_calls or [] -%}
      {%- set call = call.function or call -%}
      {{- '\n<tool_call>' + ({'name': call.name, 'arguments': call.arguments} | tojson) + '</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + message.role + '\n' + (PREAMBLE if message.role == 'user' else '') + message.content -}}
    {{- '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' + OPENED -}}{%- endif -%}
"""
