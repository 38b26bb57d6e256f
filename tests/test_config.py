"""Promise 10: every configuration key is checked before anything is compiled."""

import dataclasses
import pathlib

import pytest

from jaxrl import config as configuration
from jaxrl.config import Config, ConfigError


def test_defaults_and_dump_round_trip() -> None:
    config = configuration.parse(["ModelConfig.layers = 3\nSftConfig.learning_rate = 1"])
    assert config.model.layers == 3
    assert config.sft.learning_rate == 1.0 and isinstance(config.sft.learning_rate, float)
    assert configuration.parse([configuration.dump(config)]) == config
    assert config != Config()


def test_every_field_has_a_type_the_loader_can_check() -> None:
    for name, section in configuration.SECTIONS.items():
        for field in dataclasses.fields(section):
            with pytest.raises(ConfigError, match=rf"{name}\.{field.name}"):
                configuration.parse([f"{name}.{field.name} = {{1: 1}}"])


def test_overrides_win_and_bare_words_are_strings() -> None:
    config = configuration.load("", ["TrainConfig.steps=7", "ModelConfig.family=qwen2", "EvalConfig.k=(1, 4)"])
    assert (config.train.steps, config.model.family, config.eval.k) == (7, "qwen2", (1, 4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TrainConfig.step = 1", r"unknown key TrainConfig.step; did you mean TrainConfig.steps\?"),
        ("TrainConfg.steps = 1", r"unknown section 'TrainConfg'; did you mean TrainConfig\?"),
        ("TrainConfig.steps = 1.5", r"TrainConfig.steps=1.5 has type float; it must be int"),
        ("TrainConfig.steps = True", r"TrainConfig.steps=True has type bool; it must be int"),
        ("ModelConfig.family = 'qwen4'", r"is none of 'qwen2', 'qwen3', .*; did you mean qwen"),
        ("SandboxConfig.preload = ('numpy', 3)", r"SandboxConfig.preload=.* must be tuple of str"),
        (
            "AlgorithmConfig.loss_settings = 3",
            r"loss_settings=3 has type int; it must be dict of names to plain values",
        ),
        ("AlgorithmConfig.keep = 64", r"keep=64 is more than TrainConfig.samples=16"),
        ("TrainConfig.row_tokens = 100", r"row_tokens=100 cannot hold the longest trajectory of 512"),
        ("EngineConfig.temperature = 0.0", r"EngineConfig.temperature=0.0 must be above 0"),
        ("EvalConfig.samples = 4", r"EvalConfig.k=\(1, 8\) asks for more than EvalConfig.samples=4"),
        ("DataConfig.eval = ''", r"stories have a split of their own"),
        ("TrainConfig.steps = -1", r"TrainConfig.steps=-1 must not be negative"),
        ("EngineConfig.slots = 0", r"EngineConfig.slots=0 must be at least 1"),
        ("RewardConfig.workers = 0", r"RewardConfig.workers=0 must be at least 1"),
        ("OptimizerConfig.warmup_steps = -1", r"OptimizerConfig.warmup_steps=-1 must not be negative"),
        ("EnvConfig.infra_retries = -1", r"EnvConfig.infra_retries=-1 must not be negative"),
        ("SandboxConfig.cpu_seconds = 0.0", r"SandboxConfig.cpu_seconds=0.0 must be above 0"),
        ("EvalConfig.k = (0, 1)", r"EvalConfig.k=\(0, 1\) must be at least 1"),
        ("TrainConfig.prefetch_groups = 17", r"prefetch_groups=17 is more than TrainConfig.problems=16"),
        ("LoraConfig.rank = -1", r"LoraConfig.rank=-1 must not be negative"),
        ("MeshConfig.rollout_tensor = -1", r"MeshConfig.rollout_tensor=-1 must not be negative"),
        ("LoraConfig.alpha = 0.0", r"LoraConfig.alpha=0.0 must be above 0"),
        ("LoraConfig.path = 'adapter'", r"LoraConfig.path='adapter' but LoraConfig.rank=0 has no adapters; set the"),
        ("LoraConfig.rank = 4\nLoraConfig.targets = ()", r"rank=4 but LoraConfig.targets is empty; name matrices or"),
    ],
)
def test_promise_10_bad_configuration_is_refused_with_a_remedy(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration.parse([text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 9", "unknown key steps; did you mean SftConfig.steps\\?"),
        ("train/TrainConfig.steps = 4", "unknown key train/TrainConfig.steps; did you mean"),
        ("import os", "a recipe imports nothing"),
        ("TrainConfig.steps = %unheard_of", "cannot resolve TrainConfig"),
        ("TrainConfig.steps = [1", "cannot read the configuration"),
        ("ModelConfig.kv_heads = 0", r"ModelConfig.kv_heads=0 must be at least 1"),
        ("ModelConfig.head_width = 15", "head_width=15 must be even"),
        (
            "AlgorithmConfig.kl_coefficient = 0.1\nAlgorithmConfig.kl_placement = 'reward'\n"
            "AlgorithmConfig.kl_by_ratio = True",
            "kl_by_ratio=True is of a KL in the loss, but kl_coefficient=0.1 and kl_placement='reward'",
        ),
        (
            "AlgorithmConfig.kl_coefficient = 0.1\nAlgorithmConfig.kl_estimator = 'k1'",
            "kl_estimator='k1' has no gradient in expectation; use 'k2', 'k3' or 'k1\\+' in a loss",
        ),
        (
            "AlgorithmConfig.kl_placement = 'reward'\nAlgorithmConfig.kl_estimator = 'k3+'",
            "kl_placement='reward' has none; use 'k3'",
        ),
        ("AlgorithmConfig.kl_target = 0.1", "does nothing without a KL; set kl_coefficient above 0"),
        (
            "AlgorithmConfig.kl_coefficient = 0.1\nAlgorithmConfig.reference_every = 5\nLoraConfig.rank = 4",
            "reference_mix=0.6 of adapters is not that of the weights they add up to; set it to 1",
        ),
        ("AlgorithmConfig.top_entropy = 0.0", "top_entropy=0.0 must be above 0 and at most 1"),
        ("ModelConfig.logit_soft_cap = -1.0", r"ModelConfig.logit_soft_cap=-1.0 must not be negative"),
        ("ModelConfig.rope_factor = 0.0", r"ModelConfig.rope_factor=0.0 must be above 0"),
        ("ModelConfig.rope_high_frequency = 1.0", r"rope_high_frequency=1.0 must be above rope_low_frequency=1.0"),
        ("ModelConfig.sliding_layers = (7,)", "names layer 7 of 4"),
        ("ModelConfig.max_positions = 10", "max_positions=10 is less than the longest trajectory of 512"),
        ("OptimizerConfig.beta1 = 2.0", "beta1=2.0 must be at least 0 and below 1"),
        ("SandboxConfig.memory_mib = 5", "memory_mib=5 must be at least 16"),
        ("SandboxConfig.threads = 0", "SandboxConfig.threads=0 must be at least 1"),
        ("SandboxConfig.session_memory_mib = 0", "SandboxConfig.session_memory_mib=0 must be at least 1"),
        ("SandboxConfig.program_folders = ('/opt', 3)", "SandboxConfig.program_folders=.* must be tuple of str"),
        (
            "AlgorithmConfig.kl_target = 0.1\nAlgorithmConfig.kl_coefficient = 0.1\nAlgorithmConfig.kl_horizon = 1",
            "kl_horizon=1 must be above a fifth of the 128 trajectories",
        ),
        *(
            (
                "AlgorithmConfig.kl_target = 0.1\nAlgorithmConfig.kl_coefficient = 0.1\n"
                f"AlgorithmConfig.keep = 0\n{more}",
                f"a step, which has no bound: {named}",
            )
            for more, named in (
                (
                    "EnvConfig.joint_episode = 'draft_and_revise'",
                    "EnvConfig.joint_episode='draft_and_revise' has several",
                ),
                (
                    "AlgorithmConfig.extra_samples = 'dars_equal'",
                    "AlgorithmConfig.extra_samples='dars_equal' is played",
                ),
            )
        ),
        ("SandboxConfig.slow_slots = -1", "SandboxConfig.slow_slots=-1 must not be negative"),
    ],
)
def test_promise_10_nothing_is_swallowed_and_nothing_senseless_taken(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration.parse([text])
    if "import" not in text:
        with pytest.raises(ConfigError, match=message if "[1" not in text else "must be int"):
            configuration.load("", [text.replace(" = ", "=")])


def test_macros_of_a_recipe_can_be_set() -> None:
    recipe = "rate = 1e-3\nOptimizerConfig.learning_rate = %rate\nSftConfig.learning_rate = %rate\n"
    assert configuration.parse([recipe]).optimizer.learning_rate == 1e-3
    assert configuration.parse([recipe], ["rate=1e-4"]).sft.learning_rate == 1e-4


def test_recipe_files_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.gin").write_text(f"include '{tmp_path}/b.gin'\n")
    (tmp_path / "b.gin").write_text(f"include '{tmp_path}/a.gin'\n")
    with pytest.raises(ConfigError, match="includes itself: .*a.gin → .*b.gin → .*a.gin"):
        configuration.load(f"{tmp_path}/a.gin")
    (tmp_path / "c.gin").write_bytes(bytes([0xFF, 0xFE]))
    with pytest.raises(ConfigError, match="is no UTF-8 text"):
        configuration.load(f"{tmp_path}/c.gin")


def test_unknown_override_names_the_nearest_key() -> None:
    with pytest.raises(ConfigError, match="did you mean ModelConfig.layers"):
        configuration.load("", ["ModelConfig.layer=3"])
    with pytest.raises(ConfigError, match="has no value"):
        configuration.load("", ["ModelConfig.layers"])


def test_unknown_recipe_lists_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        configuration.load("quikstart")
    with pytest.raises(ConfigError, match="no recipe file nowhere/x.gin"):
        configuration.load("nowhere/x.gin")


def test_a_value_the_recipe_requires_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"DataConfig.train must be set; add --set DataConfig.train=…"):
        configuration.load("gsm8k_tool")


@pytest.mark.parametrize("name", configuration.recipe_names())
def test_every_recipe_resolves(name: str) -> None:
    must_be_set = [
        "DataConfig.train=a.jsonl",
        "DataConfig.eval=b.jsonl",
        "ModelConfig.path=c",
        "RewardConfig.judge=d.py:e",
    ]
    config = configuration.load(name, must_be_set)
    assert config.data.train == "a.jsonl"


def test_recipes_on_top_of_each_other(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine.gin").write_text("TrainConfig.steps = 7\nAlgorithmConfig.keep = 3\n")
    config = configuration.load(f"quickstart+{tmp_path}/mine.gin+grpo")
    assert (config.train.steps, config.algorithm.keep) == (7, 0)
    assert config.model == configuration.load("quickstart").model
    with pytest.raises(ConfigError, match="no recipe called 'dappo'; did you mean dapo"):
        configuration.load("quickstart+dappo")


def test_include_is_expanded_and_overridden() -> None:
    quickstart, smoke = configuration.load("quickstart"), configuration.load("smoke")
    assert smoke.chat == quickstart.chat
    assert smoke.model.layers < quickstart.model.layers
