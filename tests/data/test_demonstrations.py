"""Demonstrations say what a policy could write and what its tool would answer, in the shares asked for."""

import json
import re

import pytest

from jaxrl.config import ChatConfig, DataConfig, SftConfig
from jaxrl.data.arithmetic import run
from jaxrl.data.demonstrations import TOOL_NAME, gsm8k_demonstrations, load, story_demonstrations
from jaxrl.data.problems import DataError, load_split, read_rows
from jaxrl.data.stories import make_stories
from jaxrl.text.chat import ChatFormat
from jaxrl.text.tokenizer import train_sentencepiece
from jaxrl.text.tool_calls import ParsedCall, parse_tool_calls

COUNT = 1500


@pytest.fixture(scope="module")
def stories():
    return story_demonstrations(COUNT, wrong_share=0.4, repair_share=0.25, seed=0)


def codes(demonstration) -> list[str]:
    found = []
    for turn in demonstration.turns[:-1:2]:
        (call,) = parse_tool_calls(turn)
        assert isinstance(call, ParsedCall)
        assert call.name == TOOL_NAME
        assert list(call.arguments) == ["code"]
        found.append(call.arguments["code"])
    return found


def is_right(demonstration) -> bool:
    return demonstration.turns[-1].endswith(f"\\boxed{{{demonstration.problem.answer}}}</answer>")


def is_repaired(demonstration) -> bool:
    return len(demonstration.turns) == 5


def test_every_tool_output_is_what_the_code_gives(stories):
    for demonstration in stories:
        for code, output in zip(codes(demonstration), demonstration.turns[1::2], strict=True):
            assert run(code).text == output


def test_the_answer_given_is_the_last_output(stories):
    for demonstration in stories:
        answer = demonstration.turns[-2]
        assert demonstration.turns[-1] == f"</reason>\n<answer>\\boxed{{{answer}}}</answer>"
        assert int(answer) >= 0


def test_reasoning_is_closed_once_in_every_policy_turn(stories):
    for demonstration in stories:
        assert all(turn.count("</reason>") == 1 and "<reason>" not in turn for turn in demonstration.turns[::2])


def test_right_ones_solve_the_story(stories):
    truth = {story.problem.question: story.expression for story in make_stories(COUNT, 0, "train")}
    for demonstration in stories:
        expected = truth[demonstration.problem.question]
        assert is_right(demonstration) == (codes(demonstration)[-1] == expected)


def test_shares_are_those_asked_for_and_independent(stories):
    wrong = [not is_right(demonstration) for demonstration in stories]
    repaired = [is_repaired(demonstration) for demonstration in stories]
    assert abs(sum(wrong) / COUNT - 0.4) < 0.05
    assert abs(sum(repaired) / COUNT - 0.25) < 0.05
    both = sum(w and r for w, r in zip(wrong, repaired, strict=True))
    assert abs(both / COUNT - 0.1) < 0.03


@pytest.mark.parametrize("wrong", [0.0, 1.0])
@pytest.mark.parametrize("repair", [0.0, 1.0])
def test_shares_of_none_and_all(wrong, repair):
    made = story_demonstrations(200, wrong, repair, seed=3)
    assert all(is_right(demonstration) == (wrong == 0) for demonstration in made)
    assert all(is_repaired(demonstration) == (repair == 1) for demonstration in made)


def test_repaired_ones_fail_first_in_different_ways(stories):
    errors = {demonstration.turns[1].split(":")[0] for demonstration in stories if is_repaired(demonstration)}
    assert errors == {"NameError", "SyntaxError"}
    for demonstration in filter(is_repaired, stories):
        first, second = codes(demonstration)
        assert run(first).failed
        assert not run(second).failed


def test_same_seed_same_demonstrations(stories):
    assert story_demonstrations(COUNT, 0.4, 0.25, 0) == stories
    assert story_demonstrations(50, 0.4, 0.25, 1) != stories[:50]


def test_they_fit_the_chat_form(stories):
    texts = [text for demonstration in stories[:300] for text in (demonstration.problem.question, *demonstration.turns)]
    tokenizer = train_sentencepiece(texts, 512)
    chat = ChatFormat(ChatConfig(show_tools=False), (), tokenizer)
    for demonstration in stories[:50]:
        ids, mask = chat.demonstration(demonstration)
        assert len(ids) <= 256
        written = tokenizer.decode(ids[mask == 1])
        assert written == "".join(f"{turn}<|im_end|>" for turn in demonstration.turns[::2])


def rows_of(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(str(path))


def test_calculator_notes_become_a_program_whose_lines_use_each_other(tmp_path):
    answer = "In May 48/2 = <<48/2=24>>24.\nAside <<1+1=2>>2.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"
    (made,) = gsm8k_demonstrations(rows_of(tmp_path / "a.jsonl", {"question": "Sold 48, then half?", "answer": answer}))
    assert codes(made) == ["v1 = 48/2\n48+v1"]
    assert made.turns[1:] == ("72.0", "</reason>\n<answer>\\boxed{72}</answer>")


def test_a_number_that_the_question_states_is_copied(tmp_path):
    answer = "<<8-4=4>>4 then <<4*3=12>>12\n#### 12"
    (made,) = gsm8k_demonstrations(rows_of(tmp_path / "a.jsonl", {"question": "8, 4 and 3?", "answer": answer}))
    assert codes(made) == ["4*3"]


def test_equations_become_programs(tmp_path):
    row = {"id": "s", "prompt": "p", "answer": "95", "equation": "( ( 14.0 * 6.0 ) + 11.0 )"}
    (made,) = gsm8k_demonstrations(rows_of(tmp_path / "a.jsonl", row))
    assert codes(made) == ["(14*6)+11"]
    assert made.turns[1] == "95"


@pytest.mark.parametrize(
    "answer",
    [
        "no notes\n#### 5", "<<2+2=4>>4\n#### 5", "<<__import__('os')=5>>\n#### 5", "<<5/0=5>>\n#### 5",
        "<<=>>\n#### 5", "<<2+3=5>>\n#### five",
    ],
)  # fmt: skip
def test_rows_that_give_no_program_are_left_out(tmp_path, answer):
    assert gsm8k_demonstrations(rows_of(tmp_path / "a.jsonl", {"question": "q", "answer": answer})) == ()


@pytest.mark.parametrize(("name", "least"), [("gsm8k_train", 7001), ("svamp_train", 688)])
def test_real_files(shared, name, least):
    made = gsm8k_demonstrations(read_rows(str(shared / f"data/math/{name}.jsonl")))
    assert len(made) >= least
    for demonstration in made:
        assert is_right(demonstration)
        (code,) = codes(demonstration)
        assert run(code).text == demonstration.turns[1]
        assert abs(float(demonstration.turns[1]) - float(demonstration.problem.answer)) < 1e-5


def test_kept_back_rows_are_not_demonstrated(tmp_path):
    rows = [{"question": f"{i} and 1?", "answer": f"<<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(30)]
    rows_of(tmp_path / "a.jsonl", *rows)
    data = DataConfig(train=str(tmp_path / "a.jsonl"), eval="", eval_problems=10)
    train, _ = load_split(data)
    made = load(SftConfig(demonstrations="gsm8k"), data, train)
    assert {demonstration.problem for demonstration in made} == set(train)
    assert len(load(SftConfig(demonstrations="gsm8k", count=3), data, train)) == 3


def test_kinds_and_their_errors(tmp_path):
    data = DataConfig(seed=5)
    made = load(SftConfig(demonstrations="stories", count=9), data, ())
    assert made == story_demonstrations(9, 0.4, 0.25, 5)
    with pytest.raises(DataError, match=r'DataConfig\.train="stories" has none'):
        load(SftConfig(demonstrations="gsm8k"), data, ())
    rows_of(tmp_path / "a.jsonl", {"question": "q", "answer": "1"})
    bare = DataConfig(train=str(tmp_path / "a.jsonl"), eval="stories")
    with pytest.raises(DataError, match="none of the 1 training rows"):
        load(SftConfig(demonstrations="gsm8k"), bare, load_split(bare)[0])


def test_variants_ask_the_same_with_other_numbers(tmp_path):
    rows = rows_of(
        tmp_path / "a.jsonl",
        {
            "question": "48 friends, half as many in May, 3.5 each of 1,000?",
            "answer": "<<48/2=24>> <<48+24=72>>\n#### 72",
        },
        {"question": "Half of it?", "answer": "<<10/2=5>>\n#### 5"},
    )
    first, second, *others = gsm8k_demonstrations(rows, variants=20, seed=1)
    assert (first.problem.answer, second.problem.answer) == ("72", "5")
    assert len(others) == 20, "the second row states none of its numbers"
    assert others == list(gsm8k_demonstrations(rows, variants=20, seed=1)[2:])
    numbers = set()
    for other in others:
        stated = int(re.match(r"(\d\d) friends, half as many in May, 3.5 each of 1,000\?", other.problem.question)[1])
        (code,) = codes(other)
        assert code == f"v1 = {stated}/2\n{stated}+v1" and stated % 2 == 0
        assert float(other.turns[1]) == 1.5 * stated == float(other.problem.answer)
        assert other.turns[2].endswith(f"\\boxed{{{int(1.5 * stated)}}}</answer>")
        numbers.add(stated)
    assert len(numbers) > 5


def test_a_variant_keeps_different_numbers_apart(tmp_path):
    row = {
        "question": "3 boxes of 4 and 5 of 6, from 7 on 8 days?",
        "answer": "<<3*4=12>> <<5*6=30>> <<12+30=42>>\n#### 42",
    }
    (_, *others) = gsm8k_demonstrations(rows_of(tmp_path / "a.jsonl", row), variants=200)
    stated = [re.findall(r"\d+", other.problem.question) for other in others]
    assert len(stated) > 100
    assert all(len(set(numbers)) == 6 and numbers[4:] == ["7", "8"] for numbers in stated)
