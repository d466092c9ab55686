"""Hugging Face models and trainers: `enable(model)`, and training runs in chunks, exactly.

import slimgrad as sg
sg.hf.enable(model, chunk=4096)    # then Trainer, SFTTrainer, DPOTrainer, Accelerate or a loop, as before
"""
# ruff: noqa: E402  # what is missing is said before it is imported

from slimgrad.extras import require_extra

require_extra("hf", "slimgrad.hf", "transformers")

from slimgrad.hf.certificate import Certificate
from slimgrad.hf.certifying import certify
from slimgrad.hf.enabling import disable, enable
from slimgrad.hf.forwards import evaluated_in_chunks

__all__ = ["Certificate", "certify", "disable", "enable", "evaluated_in_chunks"]
