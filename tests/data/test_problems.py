"""Problem files and their errors; the held-out split; a stream that resumes exactly."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.config import DataConfig
from jaxrl.data.problems import DataError, ProblemStream, load_problems, load_split
from jaxrl.records import Problem


def write(path, *rows) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def load(spec):
    return load_problems(spec, count=5, seed=0)


def test_the_three_forms(tmp_path):
    path = write(
        tmp_path / "set.jsonl",
        {"question": "How many?", "answer": "It is <<500+580=1080>>1080.\n#### 1,080"},
        "",
        {"id": "svamp/7", "prompt": "And now?", "answer": "5", "equation": "( 10.0 / 2.0 )"},
        {"id": 9, "question": "Then?", "answer": 2.5},
    )
    assert load(path) == (
        Problem("set/1", "How many?", "1080", "set"),
        Problem("svamp/7", "And now?", "5", "set"),
        Problem("9", "Then?", "2.5", "set"),
    )


def test_files_and_stories_together(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "1"})
    problems = load(f"{path}, stories")
    assert [problem.source for problem in problems] == ["a"] + ["stories"] * 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": "q", ', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a list, not a JSON object"),
        ({"question": "q"}, 'no "answer"'),
        ({"question": "q", "answer": None}, 'no "answer"'),
        ({"question": "q", "answer": True}, 'no "answer"'),
        ({"question": "q", "answer": "  "}, '"answer" is empty'),
        ({"question": "q", "answer": "so #### "}, '"answer" is empty'),
        ({"answer": "1"}, 'no "question" or "prompt"'),
        ({"question": " ", "answer": "1"}, 'no "question" or "prompt"'),
        ({"question": 5, "answer": "1"}, 'no "question" or "prompt"'),
    ],
)
def test_errors_name_file_and_line(tmp_path, row, message):
    path = write(tmp_path / "bad.jsonl", {"question": "q", "answer": "1"}, "", row)
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"question": "q", "answer": "1"}\n{"question": "\xff", "answer": "1"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not UTF-8"):
        load(str(tmp_path / "bad.jsonl"))


def test_separators_within_a_string_do_not_end_a_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "a\u2028b\x85c", "answer": "1"}', "{")
    with pytest.raises(DataError, match=r"a\.jsonl:2: "):
        load(path)


def test_duplicate_ids_name_both_lines(tmp_path):
    row = {"id": "x", "question": "q", "answer": "1"}
    path = write(tmp_path / "a.jsonl", row, {"question": "r", "answer": "1"}, row)
    with pytest.raises(DataError, match=r'a\.jsonl:3: id "x" is taken by .*a\.jsonl:1'):
        load(path)


def test_ids_differ_over_files(tmp_path):
    (tmp_path / "b").mkdir()
    first = write(tmp_path / "train.jsonl", {"question": "q", "answer": "1"})
    second = write(tmp_path / "b" / "train.jsonl", {"question": "r", "answer": "1"})
    with pytest.raises(DataError, match='id "train/1" is taken'):
        load(f"{first},{second}")


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=r"empty\.jsonl: no rows"):
        load(str(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match=r"no problem file .*missing\.jsonl"):
        load(str(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="is a folder; give the path of a JSONL file"):
        load(str(tmp_path))


def test_real_files(shared):
    for name, count in {"gsm8k_train": 7473, "svamp_train": 689, "math500": 500, "aime24": 30, "aime25": 30}.items():
        problems = load(str(shared / f"data/math/{name}.jsonl"))
        assert len(problems) == count
        assert all(problem.answer and "," not in problem.answer for problem in problems if "gsm8k" in name)


def numbered(path, start, count) -> str:
    return write(path, *({"id": str(i), "question": f"q {i}", "answer": str(i)} for i in range(start, start + count)))


def test_rows_kept_back_are_not_trained_on(tmp_path):
    config = DataConfig(train=numbered(tmp_path / "a.jsonl", 0, 50), eval="", eval_problems=10)
    train, held = load_split(config)
    assert (len(train), len(held)) == (40, 10)
    assert not {problem.question for problem in train} & {problem.question for problem in held}
    assert load_split(config) == (train, held)


def test_one_question_twice_is_kept_back_twice(tmp_path):
    rows = [{"question": f"same  {i % 5}".replace("  ", " " * (1 + i % 2)), "answer": "1"} for i in range(20)]
    train, held = load_split(DataConfig(train=write(tmp_path / "a.jsonl", *rows), eval="", eval_problems=2))
    assert len(held) == 2
    assert len(train) == 12


def test_questions_of_the_evaluation_file_are_left_out_with_a_warning(tmp_path):
    config = DataConfig(train=numbered(tmp_path / "a.jsonl", 0, 20), eval=numbered(tmp_path / "b.jsonl", 15, 20))
    with pytest.warns(UserWarning, match="5 problems of .* are not trained on"):
        train, held = load_split(config)
    assert (len(train), len(held)) == (15, 20)


def test_an_evaluation_uses_a_choice_of_a_large_file(tmp_path):
    config = DataConfig(train="stories", train_problems=5, eval=numbered(tmp_path / "b.jsonl", 0, 99), eval_problems=9)
    held = load_split(config)[1]
    assert len(held) == 9
    assert [int(problem.id) for problem in held] != list(range(9))


def test_nothing_left_to_train_on(tmp_path):
    with pytest.raises(DataError, match="eval_problems=128 leaves none of the 5 problems"):
        load_split(DataConfig(train=numbered(tmp_path / "a.jsonl", 0, 5), eval=""))


def test_stories_of_both_splits():
    train, held = load_split(DataConfig(train_problems=30, eval_problems=10))
    assert (len(train), len(held)) == (30, 10)


PROBLEMS = tuple(Problem(str(i), f"q{i}", "1") for i in range(7))


def drawn(stream, count):
    return [stream.next() for _ in range(count)]


def test_every_epoch_has_each_problem_once_in_another_order():
    draws = drawn(ProblemStream(PROBLEMS, 0), 35)
    assert [draw for draw, _ in draws] == list(range(35))
    epochs = [tuple(problem.id for _, problem in draws[start : start + 7]) for start in range(0, 35, 7)]
    assert all(sorted(epoch) == [problem.id for problem in PROBLEMS] for epoch in epochs)
    assert len(set(epochs)) == 5


@settings(max_examples=20, deadline=None)
@given(before=st.integers(0, 20), after=st.integers(1, 10), seed=st.integers(0, 2**31 - 1))
def test_a_stream_resumes_exactly(before, after, seed):
    unbroken = ProblemStream(PROBLEMS, seed)
    drawn(unbroken, before)
    state = json.loads(json.dumps(unbroken.state()))
    resumed = ProblemStream(PROBLEMS, seed)
    resumed.restore(state)
    assert drawn(resumed, after) == drawn(unbroken, after)


def test_seeds_differ():
    assert drawn(ProblemStream(PROBLEMS, 0), 14) != drawn(ProblemStream(PROBLEMS, 1), 14)


def test_a_position_of_another_run_is_refused():
    state = ProblemStream(PROBLEMS, 0).state()
    with pytest.raises(DataError, match="seed=0 but this run has seed=1"):
        ProblemStream(PROBLEMS, 1).restore(state)
    with pytest.raises(DataError, match="problems=7 but this run has problems=6"):
        ProblemStream(PROBLEMS[:6], 0).restore(state)
    with pytest.raises(DataError, match="with ids="):
        ProblemStream(PROBLEMS[::-1], 0).restore(state)


def test_a_stream_needs_problems():
    with pytest.raises(DataError, match="no problems"):
        ProblemStream((), 0)
