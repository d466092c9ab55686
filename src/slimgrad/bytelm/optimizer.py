"""AdamW, and the learning rate over a run."""

from __future__ import annotations

import math

import torch
from torch import nn

from slimgrad.bytelm.config import TrainConfig

_DROP_AFTER, _DROP_TO = 2 / 3, 0.1


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One rate for every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate_at(config: TrainConfig, before: float, after: float) -> float:
    """A straight rise over the warm-up, then what `config.decay` says.

    Args:
        config: the run.
        before, after: the fractions of the training bytes that were seen before a step, and are after it.
    """
    if after <= config.warmup:
        return config.learning_rate * after / config.warmup
    if config.decay == "cosine":
        done = max(before - config.warmup, 0.0) / (1 - config.warmup)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    drops = config.decay == "drop" and before >= _DROP_AFTER
    return config.learning_rate * (_DROP_TO if drops else 1.0)
