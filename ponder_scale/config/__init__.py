"""Every knob of a training run, with its unit and bounds."""

from .data import DataConfig, PhaseConfig, SourceConfig
from .model import INTERLEAVED, ModelConfig
from .run import RunConfig, load_recipe
from .train import OptimConfig, PonderingSchedule, TrainConfig
from .watch import CheckpointConfig, EvaluateConfig, HealthConfig, LogConfig

__all__ = [
    "INTERLEAVED",
    "CheckpointConfig",
    "DataConfig",
    "EvaluateConfig",
    "HealthConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "PhaseConfig",
    "PonderingSchedule",
    "RunConfig",
    "SourceConfig",
    "TrainConfig",
    "load_recipe",
]
