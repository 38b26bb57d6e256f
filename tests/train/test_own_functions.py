"""Functions of the user's are tried on what the run has, before it starts."""

import dataclasses
import pathlib

import pytest

from jaxrl.config import Config, ConfigError
from jaxrl.train.run import RunFolder
from jaxrl.train.session import open_session

FOREIGN = """
def foreign(graded):
    return 1.0 if graded.trajectory.problem.id == "example" else {}["points"]
"""


def test_components_meet_a_problem_of_the_run(tiny_config: Config, tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine.py").write_text(FOREIGN)
    reward = dataclasses.replace(tiny_config.reward, components={f"{tmp_path}/mine.py:foreign": 1.0})
    with pytest.raises(ConfigError, match=r"RewardConfig.components='.*' raised KeyError: 'points' \(.*mine.py:3\)$"):
        open_session(dataclasses.replace(tiny_config, reward=reward), RunFolder(tmp_path / "run"))
