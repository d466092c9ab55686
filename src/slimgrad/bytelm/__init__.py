"""Training a Performer on bytes: a configuration, a loop that survives, evaluation, generation."""

from slimgrad.extras import require_extra

require_extra("train", "slimgrad.bytelm")

from slimgrad.bytelm.config import TrainConfig, with_fields, with_settings
from slimgrad.bytelm.device import pick_device
from slimgrad.bytelm.evaluation import CHUNKS_IN_A_PIECE, Evaluated, evaluate_stream, read_pieces
from slimgrad.bytelm.folder import RunFolder, open_model
from slimgrad.bytelm.loop import Trained, build_model, plan_schedule, train, validate
from slimgrad.bytelm.memory import Cost, measure_gradient
from slimgrad.bytelm.presets import PRESETS, get_preset
from slimgrad.bytelm.row import Row
from slimgrad.bytelm.sample import generate, stream
from slimgrad.bytelm.task import Task, make_task, split_corpus
from slimgrad.sweep.schedules.names import parse_schedule

__all__ = [
    "CHUNKS_IN_A_PIECE",
    "PRESETS",
    "Cost",
    "Evaluated",
    "Row",
    "RunFolder",
    "Task",
    "TrainConfig",
    "Trained",
    "build_model",
    "evaluate_stream",
    "generate",
    "get_preset",
    "make_task",
    "measure_gradient",
    "open_model",
    "parse_schedule",
    "pick_device",
    "plan_schedule",
    "read_pieces",
    "split_corpus",
    "stream",
    "train",
    "validate",
    "with_fields",
    "with_settings",
]
