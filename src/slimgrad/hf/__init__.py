"""Hugging Face models and trainers: `enable(model)`, and training runs in chunks, exactly.

import slimgrad as sg
sg.hf.enable(model, chunk=4096)    # then Trainer, SFTTrainer, DPOTrainer, Accelerate or a loop, as before
"""

try:
    import transformers  # noqa: F401  # pyright: ignore[reportUnusedImport]
except ImportError as error:
    raise ImportError("slimgrad.hf needs transformers: pip install 'slimgrad[hf]'") from error

from slimgrad.hf.certificate import Certificate
from slimgrad.hf.certifying import certify
from slimgrad.hf.enabling import disable, enable

__all__ = ["Certificate", "certify", "disable", "enable"]
