"""A run makes its methods once: a file of the user's is executed at start and not at every step."""

import dataclasses
import pathlib

import numpy as np

from jaxrl.config import RewardConfig
from jaxrl.train.methods import methods_of
from jaxrl.train.pack import pack
from tests.train.test_pack import advantages, config, groups

OWN = """
import pathlib

with pathlib.Path(__file__).with_suffix(".log").open("a") as log:
    log.write("loaded\\n")

def centred(outcomes):
    return outcomes.rewards - outcomes.rewards.mean()

def all_of_them(candidates):
    return list(range(len(candidates.trajectories)))

def one(graded):
    return 1.0
"""


def test_the_file_of_a_user_is_loaded_when_methods_are_made_and_not_when_they_are_used(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    plain = config("grpo")
    own = dataclasses.replace(
        plain,
        algorithm=dataclasses.replace(
            plain.algorithm, advantage=f"{file}:centred", advantage_settings={}, selection=f"{file}:all_of_them"
        ),
        reward=RewardConfig(components={f"{file}:one": 1.0}),
    )
    methods = methods_of(own)
    loaded = file.with_suffix(".log").read_text()
    for _ in range(2):
        played = groups([1.0, 0.0], [5.0, 0.0])
        chosen = tuple(methods.rules.choose(group.kept, np.random.default_rng(0)) for group in played)
        assert [len(group.kept) for group in chosen] == [0, 0], "nobody is right"
        (values,) = advantages(pack(own, played, {}, methods=methods))
        assert sorted(set(values.tolist())) == [-1.5, -0.5, 3.5]
    assert loaded and file.with_suffix(".log").read_text() == loaded
