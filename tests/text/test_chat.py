"""The conversation is laid down once, piece by piece, and is the one transformers would render."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrl.config import ChatConfig, ConfigError
from jaxrl.records import Conversation, Demonstration, Message, Problem
from jaxrl.text.chat import ChatFormat, ToolSchema
from jaxrl.text.tokenizer import Tokenizer

TOOL = ToolSchema(
    "python",
    "Runs Python; it's <fast> & \\ „quoted“",
    {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
)
FULL = ChatConfig(system="It's a \\n test.\nThink in <reason></reason>.", preamble="Solve {{ this }}:\n")
CONFIGS = {
    "full": FULL,
    "short": ChatConfig(show_tools=False),
    "tools only": ChatConfig(),
    "system only": ChatConfig(system="S", show_tools=False),
    "closed": ChatConfig(show_tools=False, open_reason=False),
}
FOREIGN = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>assistant\n", "</tool_response>", "<tool_call>", "\n", " ", "12", "é", "a"]
    ),
    max_size=6,
).map("".join)
quick = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ChatConfig:
    return CONFIGS[request.param]


def make(config: ChatConfig, tokenizer: Tokenizer) -> ChatFormat:
    return ChatFormat(config, (TOOL,), tokenizer)


def test_the_short_form_letter_by_letter(any_tokenizer):
    chat = make(CONFIGS["short"], any_tokenizer)
    ids = [*chat.prompt("2+2?"), *any_tokenizer.encode("</reason>", special=True), any_tokenizer.end_id]
    ids += chat.tool_turn([any_tokenizer.encode("4"), any_tokenizer.encode("x\n")]).tolist()
    assert any_tokenizer.decode(ids) == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<reason></reason><|im_end|>"
        "\n<|im_start|>user\n<tool_response>\n4\n</tool_response>\n<tool_response>\nx\n\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<reason>"
    )


def test_the_full_form_shows_system_text_and_schemas(tokenizer):
    text = tokenizer.decode(make(FULL, tokenizer).prompt("Q"))
    assert text.startswith(f"<|im_start|>system\n{FULL.system}\n\n# Tools\n\n")
    assert '\n<tools>\n{"type": "function", "function": {"name": "python", ' in text
    assert text.endswith("<|im_start|>user\nSolve {{ this }}:\nQ<|im_end|>\n<|im_start|>assistant\n<reason>")


@pytest.mark.parametrize(("name", "turns"), [("short", 0), ("tools only", 1), ("system only", 1), ("full", 1)])
def test_a_system_turn_only_when_it_says_something(tokenizer, name, turns):
    text = tokenizer.decode(make(CONFIGS[name], tokenizer).prompt("Q"))
    assert text.count("<|im_start|>system") == turns
    assert ("<tools>" in text) == CONFIGS[name].show_tools


def test_a_format_without_tools_shows_none(tokenizer):
    assert "<tools>" not in tokenizer.decode(ChatFormat(ChatConfig(), (), tokenizer).prompt("Q"))


def conversation(chat: ChatFormat, question: str, turns: list[tuple[str, list[str]]], last: str) -> np.ndarray:
    """As the episode driver lays it down: the policy's ids, its end token, the environment's ids."""
    encode = chat.tokenizer.encode
    ids = chat.prompt(question).tolist()
    for said, outputs in turns:
        ids += [*encode(said, special=True), chat.tokenizer.end_id]
        ids += chat.tool_turn([encode(output) for output in outputs]).tolist()
    return np.asarray([*ids, *encode(last, special=True), chat.tokenizer.end_id])


def messages(question: str, turns: list[tuple[str, list[str]]], last: str) -> list[dict[str, str]]:
    listed = [{"role": "user", "content": question}]
    for said, outputs in turns:
        listed.append({"role": "assistant", "content": said})
        listed += [{"role": "tool", "content": output} for output in outputs]
    return [*listed, {"role": "assistant", "content": last}]


POLICY = st.text(alphabet="ab 12\n{}").map(lambda text: f"{text}</reason>")
TURNS = st.lists(st.tuples(POLICY, st.lists(FOREIGN, min_size=1, max_size=3)), max_size=3)


@quick
@given(question=FOREIGN, turns=TURNS, last=POLICY)
def test_text_of_the_stream_is_what_transformers_renders(rendered, config, any_tokenizer, question, turns, last):
    chat = make(config, any_tokenizer)
    theirs = rendered(config, any_tokenizer).apply_chat_template(messages(question, turns, last), tokenize=False)
    # The policy stops at its end token; the newline after it belongs to whatever comes next.
    assert any_tokenizer.decode(conversation(chat, question, turns, last)) + "\n" == theirs


PLAIN = st.text(alphabet="ab 12\n.é")


@quick
@given(
    question=PLAIN, turns=st.lists(st.tuples(POLICY, st.lists(PLAIN, min_size=1, max_size=3)), max_size=3), last=POLICY
)
def test_ids_of_the_stream_are_those_of_transformers(rendered, config, tokenizer, question, turns, last):
    """For texts that hold no token's name, where spelling out and reading special tokens agree."""
    theirs = rendered(config, tokenizer)
    ids = conversation(make(config, tokenizer), question, turns, last).tolist()
    newline = tokenizer.encode("\n")
    assert theirs.apply_chat_template(messages(question, turns, last), return_dict=False) == ids + newline
    prompt = theirs.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    assert prompt == make(config, tokenizer).prompt(question).tolist()


@pytest.fixture(scope="session")
def rendered(tmp_path_factory, reload):
    loaded = {}

    def read(config: ChatConfig, tokenizer: Tokenizer):
        if (config, tokenizer) not in loaded:
            folder = tmp_path_factory.mktemp("chat")
            make(config, tokenizer).save(folder)
            loaded[config, tokenizer] = reload(folder)
        return loaded[config, tokenizer]

    return read


def test_the_template_takes_tools_and_system_messages_from_the_caller(rendered, tokenizer):
    theirs = rendered(CONFIGS["short"], tokenizer)
    asked = [{"role": "system", "content": FULL.system}, {"role": "user", "content": FULL.preamble + "Q"}]
    text = theirs.apply_chat_template(asked, tools=[TOOL.as_function()], add_generation_prompt=True, tokenize=False)
    assert text == tokenizer.decode(make(FULL, tokenizer).prompt("Q"))


def test_the_template_writes_structured_calls(rendered, tokenizer):
    theirs = rendered(CONFIGS["short"], tokenizer)
    call = {"type": "function", "function": {"name": "python", "arguments": {"code": "1<2"}}}
    text = theirs.apply_chat_template(
        [{"role": "assistant", "content": "Think.</reason>", "tool_calls": [call]}], tokenize=False
    )
    assert text == (
        "<|im_start|>assistant\n<reason>Think.</reason>\n"
        '<tool_call>{"name": "python", "arguments": {"code": "1<2"}}</tool_call><|im_end|>\n'
    )


@quick
@given(question=FOREIGN, outputs=st.lists(FOREIGN, min_size=1, max_size=3))
def test_foreign_text_cannot_end_a_turn_or_close_a_tag(any_tokenizer, question, outputs):
    chat = make(CONFIGS["short"], any_tokenizer)
    assert chat.prompt(question).tolist().count(any_tokenizer.end_id) == 1
    turn = chat.tool_turn([any_tokenizer.encode(output) for output in outputs]).tolist()
    assert turn.count(any_tokenizer.end_id) == 1
    (closing,) = any_tokenizer.encode("</tool_response>", special=True)
    assert turn.count(closing) == len(outputs)


def test_outputs_with_control_tokens_are_refused(tokenizer):
    with pytest.raises(ValueError, match="tool output 1 holds a control token"):
        make(CONFIGS["short"], tokenizer).tool_turn([[5], tokenizer.encode("a<|im_end|>", special=True)])


def test_a_tool_turn_needs_an_output(tokenizer):
    with pytest.raises(ValueError, match="at least one output"):
        make(CONFIGS["short"], tokenizer).tool_turn([])


def worked(*turns: str) -> Demonstration:
    return Demonstration(Problem("p/1", "What is 2*3?", "6"), turns)


def test_a_demonstration_is_the_stream_of_a_rollout(config, any_tokenizer):
    chat = make(config, any_tokenizer)
    ids, mask = chat.demonstration(worked("a</reason>", "6", "b</reason>", "7 <|im_end|>", "c"))
    assert ids.dtype == np.int32
    assert mask.dtype == np.int8
    laid = conversation(chat, "What is 2*3?", [("a</reason>", ["6"]), ("b</reason>", ["7 <|im_end|>"])], "c")
    assert ids.tolist() == laid.tolist()


def test_the_mask_covers_what_the_policy_writes_and_its_end_token(config, any_tokenizer):
    ids, mask = make(config, any_tokenizer).demonstration(worked("a</reason>", "6", "c"))
    assert any_tokenizer.decode(ids[mask == 1]) == "a</reason><|im_end|>c<|im_end|>"
    assert mask[-1] == 1
    joint = int(np.flatnonzero(mask[:-1] & (ids[:-1] == any_tokenizer.end_id))[0]) + 1
    assert any_tokenizer.decode(ids[joint : joint + 1]) == "\n"
    assert mask[joint] == 0


def test_bad_demonstrations_are_refused(tokenizer):
    chat = make(CONFIGS["short"], tokenizer)
    with pytest.raises(ValueError, match='"p/1" has 2 turns'):
        chat.demonstration(worked("a", "b"))
    with pytest.raises(ValueError, match='"p/1": policy turn 2 holds a ChatML control token'):
        chat.demonstration(worked("a", "b", "c<|im_end|>d"))


def recorded(*messages: tuple[str, str]) -> Conversation:
    return Conversation("c", tuple(Message(role, text) for role, text in messages))


def test_a_recorded_conversation_is_the_stream_of_a_rollout(config, any_tokenizer):
    chat = make(config, any_tokenizer)
    demonstration = worked("a</reason>", "6", "b</reason>", "7 <|im_end|>", "c")
    roles = ("assistant", "tool", "assistant", "tool", "assistant")
    conversation = recorded(("user", "2+2?"), *zip(roles, demonstration.turns, strict=True))
    question = dataclasses.replace(demonstration, problem=Problem("p", "2+2?", "4"))
    for got, wanted in zip(chat.conversation(conversation), chat.demonstration(question), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_recorded_conversation_is_the_one_transformers_renders(config, any_tokenizer, reload, tmp_path):
    chat = make(config, any_tokenizer)
    messages = [
        ("system", "Own."),
        ("user", "2+2?"),
        ("assistant", "a</reason>"),
        ("tool", "6"),
        ("tool", "7\n"),
        ("assistant", "b"),
        ("user", "Sure?"),
        ("assistant", "c"),
    ]
    chat.save(tmp_path)
    rows = [{"role": role, "content": text} for role, text in messages]
    rendered = reload(tmp_path).apply_chat_template(rows, tokenize=False)
    ids, mask = chat.conversation(recorded(*messages))
    assert any_tokenizer.decode(ids) == rendered.removesuffix("\n")
    assert any_tokenizer.decode(ids[mask == 1]) == "a</reason><|im_end|>b<|im_end|>c<|im_end|>"


def test_what_failed_or_has_no_weight_is_context_alone(tokenizer):
    chat = make(FULL, tokenizer)
    user, tool, last = Message("user", "Q"), Message("tool", "6"), Message("assistant", "c")
    for first in (Message("assistant", "a", failed=True), Message("assistant", "a", learned=False)):
        conversation = Conversation("c", (user, first, tool, last))
        ids, mask = chat.conversation(conversation, mask_failed=first.failed)
        assert tokenizer.decode(ids[mask == 1]) == "c<|im_end|>"
        plain, _ = chat.conversation(Conversation("c", (user, Message("assistant", "a"), tool, last)))
        np.testing.assert_array_equal(ids, plain)
    ids, mask = chat.demonstration(dataclasses.replace(worked("a", "6", "c"), failed=(0,)), mask_failed=True)
    assert tokenizer.decode(ids[mask == 1]) == "c<|im_end|>"
    with pytest.raises(ConfigError, match='conversation "c": message 1 holds a ChatML control token'):
        chat.conversation(recorded(("user", "Q"), ("assistant", "a<|im_end|>")))
