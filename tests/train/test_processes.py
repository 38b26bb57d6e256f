"""One run in one, two and four processes."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from jaxrl.config import AlgorithmConfig, ConfigError
from jaxrl.data.packing import pack_trajectories
from jaxrl.data.tree_packing import Sharing
from jaxrl.records import Group, ToolCall, ToolStatus, Turn
from jaxrl.rl import algorithm, selection
from jaxrl.rl.outcomes import Recorded, of_trajectories
from jaxrl.train import outlines, shares
from tests import several
from tests.train.updating import CONFIG, group

HERE = pathlib.Path(__file__).parent


def played(draw: int):
    """A group with calls, text and answers in it."""
    plain = group(draw)
    calls = tuple(
        ToolCall("python", {"code": f"print({number // 2})"}, status, stdout="12", stderr="oh", seconds=0.5)
        for number, status in enumerate((ToolStatus.OK, ToolStatus.ERROR, ToolStatus.OK))
    )
    return dataclasses.replace(
        plain,
        trajectories=tuple(
            dataclasses.replace(t, text="so", answer="12", answer_tags=1, turns=(Turn(0, len(t.ids), "policy", calls),))
            for t in plain.trajectories
        ),
    )


def test_an_outline_is_sent_without_what_was_said() -> None:
    one = played(3)
    message = outlines.encode(one)
    assert b"print" not in message and b"oh" not in message
    known = outlines.decode(message, one.problem, one.draw)
    for have, sent, whole in zip(known.trajectories, outlines.outline(one).trajectories, one.trajectories, strict=True):
        for field in dataclasses.fields(whole):
            np.testing.assert_array_equal(getattr(have, field.name), getattr(sent, field.name), err_msg=field.name)
        assert have.ids.shape == whole.ids.shape and not have.ids.any() and not have.logprobs.any()
        np.testing.assert_array_equal(have.mask, whole.mask)
        np.testing.assert_array_equal(have.versions, whole.versions)
        digests = [call.arguments["digest"] for call in have.calls]
        assert digests[0] == digests[1] != digests[2]  # calls that repeat each other still do


def test_selection_from_outlines_is_that_from_what_was_played() -> None:
    for draw in range(5):
        whole = played(draw)
        known = outlines.decode(outlines.encode(whole), whole.problem, draw)
        rules = selection.chooser(dataclasses.replace(CONFIG.algorithm, selection="roc"))
        both = [rules.choose(seen.trajectories, np.random.default_rng(0)) for seen in (whole, known)]
        assert [t.sample for t in both[0].kept] == [t.sample for t in both[1].kept]
        assert both[0].statistics == both[1].statistics


def test_it_is_found_out_what_of_the_contents_an_advantage_reads(tmp_path: pathlib.Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "import numpy as np\n"
        "def takes_it_for_granted(outcomes):\n    return [float(x.sum()) for x in outcomes.logprobs]\n"
        "def weighs(outcomes):\n    return [np.exp(x.sum()) for x in outcomes.logprobs or np.zeros((2, 1))]\n"
    )
    recorded = Recorded(contents=False, square_sums=True)
    for name, asked in {
        "grpo": set(),
        "gigpo": {"states"},
        "tree_depth": {"nodes"},
        "optimal_token_baseline": {"logprobs"},
        f"{own}:takes_it_for_granted": {"logprobs"},
        f"{own}:weighs": {"logprobs"},
    }.items():
        assert algorithm.contents_asked(AlgorithmConfig(advantage=name), recorded) == asked
    seen = of_trajectories(group(0).trajectories, np.zeros(5, int), recorded, {})
    assert seen.states is seen.nodes is seen.logprobs is None, "unknown, and not guessed"


@pytest.mark.parametrize(
    ("packing", "recorded", "remedy"),
    [("tree", False, "'shared_prompt'"), ("tree", True, "'rows'"), ("shared_prompt", True, "'rows'")],
)
def test_what_processes_do_not_know_of_each_other_is_not_shared(packing: str, recorded: bool, remedy: str) -> None:
    config = dataclasses.replace(
        CONFIG,
        train=dataclasses.replace(CONFIG.train, packing=packing),
        engine=dataclasses.replace(CONFIG.engine, record_experts=recorded),
    )
    shares.check_processes(config, 1)
    with pytest.raises(ConfigError, match=rf"TrainConfig\.packing='{packing}' .* 2, .* set it to {remedy}"):
        shares.check_processes(config, 2)


def test_processes_lay_out_a_shared_prompt_alike() -> None:
    """From whole trajectories and from outlines, which have no tokens."""
    asked = np.arange(4, 9, dtype=np.int32)
    whole = [dataclasses.replace(one, prompt_ids=asked) for draw in range(3) for one in group(draw).trajectories]
    outlined = [
        one
        for draw in range(3)
        for one in outlines.outline(
            Group(whole[0].problem, draw, tuple(one for one in whole if one.draw == draw))
        ).trajectories
    ]
    weights = [one.mask.astype(np.float32) for one in whole]
    shape = {"rows": 2, "row_tokens": 40, "sharing": Sharing(False, 40)}
    known, told = (pack_trajectories(some, [1.0] * len(whole), weights, **shape) for some in (whole, outlined))
    assert len(known) > 1 and (known[0].tree.copies > 1).any()
    for one, other in zip(known, told, strict=True):
        for name in ("positions", "ends", "copies", "predictors"):
            np.testing.assert_array_equal(getattr(one.tree, name), getattr(other.tree, name))
        np.testing.assert_array_equal(one.segment_ids, other.segment_ids)
        assert one.tree.tokens.any() and not other.tree.tokens.any()


def test_processes_take_the_same_groups_as_they_are_finished(tmp_path: pathlib.Path) -> None:
    for code, _, err in several.together(HERE / "playing.py", 2, 1, str(tmp_path)):
        assert code == 0, err
    first, second = (json.loads((tmp_path / f"{process}.json").read_text()) for process in (0, 1))
    assert first["taken"] == second["taken"]
    assert first["taken"][-1] == [1, 2], "what straggled holds nobody up"
    assert sorted(draw for draws in first["taken"] for draw in draws) == list(range(8))
    assert sorted(first["whole"]) == [0, 2, 4, 6] and sorted(second["whole"]) == [1, 3, 5, 7]
    assert first["left"] == second["left"] == []


def written(script: str, folder: pathlib.Path, processes: tuple[int, ...]) -> Iterator[Mapping[str, np.ndarray]]:
    """What the first of so many processes wrote, which have four devices together."""
    for count in processes:
        for code, _, err in several.together(HERE / script, count, 4 // count, str(folder / str(count))):
            assert code == 0, err
        yield np.load(folder / f"{count}.npz")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "processes"),
    [("updating.py", (1, 2, 4)), ("scoring.py", (1, 2))],
    ids=["updates", "scores and a critic"],
)
def test_what_several_processes_compute_is_what_one_does(
    script: str, processes: tuple[int, ...], tmp_path: pathlib.Path
) -> None:
    """Tokens and experts are joined exactly; the order in which gradients are summed between processes is another."""
    one, *others = written(script, tmp_path, processes)
    for other in others:
        assert set(one) == set(other)
        for name in one:
            if name.startswith(("['tokens", "['experts']")):
                assert one[name].any()
                np.testing.assert_array_equal(other[name], one[name], err_msg=name)
            np.testing.assert_allclose(other[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)
