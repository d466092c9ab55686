"""Training a Performer on bytes: a configuration, a loop, what a gradient costs, and text from the result."""

from slimgrad.train.config import TrainConfig, config_for
from slimgrad.train.loop import Row, Trained, build_model, plan_schedule, train
from slimgrad.train.memory import Cost, measure_gradient
from slimgrad.train.sample import generate

__all__ = [
    "Cost",
    "Row",
    "TrainConfig",
    "Trained",
    "build_model",
    "config_for",
    "generate",
    "measure_gradient",
    "plan_schedule",
    "train",
]
