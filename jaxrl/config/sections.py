"""All sections of a configuration together."""

import dataclasses
from dataclasses import field

from jaxrl.config.episodes import EngineConfig, EnvConfig, RewardConfig, SandboxConfig
from jaxrl.config.model import ChatConfig, LoraConfig, MeshConfig, ModelConfig, TokenizerConfig
from jaxrl.config.offline import DistillConfig, PreferConfig
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


@dataclasses.dataclass(frozen=True)
class Config:
    """All sections of one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    prefer: PreferConfig = field(default_factory=PreferConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


SECTIONS: dict[str, type] = {
    entry.default_factory.__name__: entry.default_factory for entry in dataclasses.fields(Config)
}
"""Every section by its name."""
