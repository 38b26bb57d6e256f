"""Methods by name, or by path: what is found, what is refused, and in which words."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import config as configuration
from jaxrl.config import AlgorithmConfig, ConfigError
from jaxrl.rl import algorithm
from jaxrl.rl.outcomes import Outcomes, Recorded
from jaxrl.rl.tokens import Tokens

LOSS = """
from jaxrl.rl.tokens import TokenLoss

def scaled(tokens, *, scale: float = 1.0):
    return TokenLoss(-scale * tokens.advantages * tokens.ratio, {"mean_ratio": tokens.ratio})

def per_row(tokens):
    return TokenLoss(tokens.ratio.sum(axis=1), {})

def untyped(tokens, *, scale=1.0):
    return scaled(tokens)

def positional(tokens, scale: float = 1.0):
    return scaled(tokens)

def nothing():
    return None

def branching(tokens):
    if tokens.ratio.sum() > 1:
        return scaled(tokens)

def unmeasured(tokens):
    return TokenLoss(tokens.ratio, None)

def summed(logprobs):
    return logprobs.sum()
"""
ADVANTAGE = """
import numpy as np

def raw(outcomes, *, factor: int = 1):
    return [factor * reward for reward in outcomes.rewards]

def too_few(outcomes):
    return [0.0]

def forgetful(outcomes):
    outcomes.rewards - 1

def undefined(outcomes):
    return np.full(2, np.nan)

def unbounded(outcomes):
    return [0.0, np.where(outcomes.masks[1] > 0, np.inf, 0.0)]

def undefined_beside(outcomes):
    return [np.where(mask > 0, 1.0, np.nan) for mask in outcomes.masks]

def worded(outcomes):
    return ["good", "bad"]

def dividing(outcomes):
    return helper(outcomes)

def helper(outcomes):
    raise ZeroDivisionError("no\\nluck")
"""


@pytest.fixture
def files(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "mine.py").write_text(LOSS + ADVANTAGE)
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found")
    return tmp_path


def test_a_loss_and_an_advantage_from_a_file(files: pathlib.Path) -> None:
    config = AlgorithmConfig(
        loss=f"{files}/mine.py:scaled",
        loss_settings={"scale": 3},
        advantage=f"{files}/mine.py:raw",
        advantage_settings={"factor": 2},
    )
    one = jnp.ones((1, 2))
    tokens = Tokens(0.5 * one, 0 * one, 0 * one, 2 * one, one, jnp.ones((1, 2), jnp.int32), one, one)
    result = algorithm.policy_loss(config)(tokens)
    np.testing.assert_allclose(result.loss, -6 * np.exp(0.5) * np.ones((1, 2)), rtol=1e-6)
    outcomes = Outcomes(rewards=np.array([1.0, 0.5]), groups=np.zeros(2, int), masks=[np.ones(1)] * 2)
    assert list(algorithm.advantage(config, Recorded())(outcomes).values) == [2.0, 1.0]


@pytest.mark.parametrize(
    ("field", "name", "settings", "words"),
    [
        ("loss", "ppo_clipp", {}, "AlgorithmConfig.loss='ppo_clipp' is no method; did you mean ppo_clip?"),
        ("loss", "ppo_clip", {"clip_hihg": 0.3}, "unknown key 'clip_hihg' in AlgorithmConfig.loss_settings; did you"),
        ("loss", "ppo_clip", {"clip_high": "a"}, r"loss_settings\['clip_high'\]='a' has type str; it must be float"),
        ("loss", "ppo_clip", {"dual_clip": 0.5}, "dual_clip=0.5 must be above 1, or 0"),
        ("loss", "ppo_clip", {"clip_low": 1.5}, "clip_low=1.5 must lie between 0 and 1"),
        ("advantage", "dr_grpo", {"epsilon": 0.1}, "dr_grpo has no settings"),
        ("loss", "nowhere.py:loss", {}, "there is no file nowhere.py"),
        ("loss", "{files}/broken.py:loss", {}, "cannot be loaded: ModuleNotFoundError"),
        ("loss", "{files}/mine.py:scale", {}, "has no function scale; did you mean scaled"),
        ("loss", "{files}/mine.py:untyped", {}, "'scale' must be by keyword alone, with a type and a default"),
        ("loss", "{files}/mine.py:positional", {}, "'scale' must be by keyword alone"),
        ("loss", "{files}/mine.py:nothing", {}, "must take its data as its first argument"),
        ("loss", "{files}/mine.py:per_row", {}, "it must give a jaxrl.rl.tokens.TokenLoss with a loss of that shape"),
        ("loss", "{files}/mine.py:per_row", {}, r"gave a TokenLoss with an array of shape \(2,\) and metrics {} for"),
        ("loss", "{files}/mine.py:unmeasured", {}, "gave a TokenLoss with an .* and metrics None for"),
        ("loss", "{files}/mine.py:branching", {}, r"^AlgorithmConfig.loss='.*' raised TracerBool[^\n]*mine.py:20\)$"),
        ("mismatch", "{files}/mine.py:summed", {}, r"AlgorithmConfig.mismatch='.*' raised AttributeError"),
        ("advantage", "{files}/mine.py:too_few", {}, "it must give one entry a trajectory"),
        ("advantage", "{files}/mine.py:forgetful", {}, "gave None; it must give one entry a trajectory"),
        ("advantage", "{files}/mine.py:worded", {}, r"gave \['good', 'bad'\]; it must"),
        ("advantage", "{files}/mine.py:undefined", {}, "gave nan for a trajectory of 3 tokens; it must be finite"),
        ("advantage", "{files}/mine.py:unbounded", {}, "for a trajectory of 4 tokens; it must be finite"),
        ("advantage", "{files}/mine.py:dividing", {}, r"raised ZeroDivisionError: no \(.*mine.py:56\)$"),
        ("selection", "{files}/mine.py:dividing", {}, "selection='.*' raised ZeroDivisionError"),
    ],
)
def test_what_is_refused(files: pathlib.Path, field: str, name: str, settings: dict, words: str) -> None:
    config = AlgorithmConfig(**{field: name.format(files=files), f"{field}_settings": settings})
    with pytest.raises(ConfigError, match=words):
        algorithm.check(config, Recorded())


def test_an_advantage_need_not_be_finite_where_nothing_was_sampled(files: pathlib.Path) -> None:
    algorithm.check(AlgorithmConfig(advantage=f"{files}/mine.py:undefined_beside"), Recorded())


def test_settings_survive_gin_text() -> None:
    config = configuration.load("", ["AlgorithmConfig.loss_settings={'clip_high': 0.3, 'dual_clip': 10}"])
    assert configuration.parse([configuration.dump(config)]) == config
    assert config.algorithm.loss_settings == {"clip_high": 0.3, "dual_clip": 10}
    assert jax.tree.structure(algorithm.policy_loss(config.algorithm).keywords).num_leaves == 2
