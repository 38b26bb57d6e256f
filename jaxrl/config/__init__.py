"""Every knob of jaxrl, as frozen dataclasses that gin binds, and nothing else is configurable.

A recipe (``configs/*.gin``) binds fields as ``Section.field = value``; ``--set Section.field=value`` on the
command line binds on top. ``load`` checks every key and every type before anything is compiled.
"""

from jaxrl.checks import ConfigError, most_trajectories
from jaxrl.config.episodes import EngineConfig, EnvConfig, RewardConfig, SandboxConfig
from jaxrl.config.model import ChatConfig, LoraConfig, MeshConfig, ModelConfig, TokenizerConfig
from jaxrl.config.offline import DistillConfig, PreferConfig
from jaxrl.config.recipes import nearest, read_recipe, recipe_names
from jaxrl.config.resolve import dump, load, parse, typed
from jaxrl.config.sections import SECTIONS, Config
from jaxrl.config.training import (
    AlgorithmConfig,
    CheckpointConfig,
    CriticConfig,
    DataConfig,
    EvalConfig,
    MixConfig,
    OptimizerConfig,
    SftConfig,
    StagesConfig,
    TrainConfig,
)

__all__ = [
    "SECTIONS",
    "AlgorithmConfig",
    "ChatConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "CriticConfig",
    "DataConfig",
    "DistillConfig",
    "EngineConfig",
    "EnvConfig",
    "EvalConfig",
    "LoraConfig",
    "MeshConfig",
    "MixConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PreferConfig",
    "RewardConfig",
    "SandboxConfig",
    "SftConfig",
    "StagesConfig",
    "TokenizerConfig",
    "TrainConfig",
    "dump",
    "load",
    "most_trajectories",
    "nearest",
    "parse",
    "read_recipe",
    "recipe_names",
    "typed",
]
