"""Training a Performer on bytes: a configuration, a loop that survives, evaluation, generation."""

from slimgrad.train.config import TrainConfig, config_for, with_settings
from slimgrad.train.device import pick_device
from slimgrad.train.evaluation import CHUNKS_IN_A_PIECE, Evaluated, evaluate_stream, read_pieces
from slimgrad.train.folder import RunFolder, open_model, require_new
from slimgrad.train.loop import Trained, build_model, plan_schedule, train, validate
from slimgrad.train.memory import Cost, limit_memory, measure_gradient
from slimgrad.train.row import Row
from slimgrad.train.sample import generate, stream
from slimgrad.train.schedules import parse_schedule
from slimgrad.train.snapshot import Snapshot, describe_environment, read_snapshot, require_shape
from slimgrad.train.stopping import Interrupted, Stop
from slimgrad.train.task import Task, make_task

__all__ = [
    "CHUNKS_IN_A_PIECE",
    "Cost",
    "Evaluated",
    "Interrupted",
    "Row",
    "RunFolder",
    "Snapshot",
    "Stop",
    "Task",
    "TrainConfig",
    "Trained",
    "build_model",
    "config_for",
    "describe_environment",
    "evaluate_stream",
    "generate",
    "limit_memory",
    "make_task",
    "measure_gradient",
    "open_model",
    "parse_schedule",
    "pick_device",
    "plan_schedule",
    "read_pieces",
    "read_snapshot",
    "require_new",
    "require_shape",
    "stream",
    "train",
    "validate",
    "with_settings",
]
