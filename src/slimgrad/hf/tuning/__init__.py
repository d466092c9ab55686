"""Fine-tuning a Hugging Face model on documents of any length: transformers' Trainer around an enabled model.

```
settings    what a run was asked for
tokens      from a file or a folder to documents of tokens, in a file of their own
loading     the model's class, its tokenizer, its weights, its adapters
folder      what a run leaves on disk, and how it is taken up again
trainer     the Trainer, whose evaluation goes in chunks too
tune        from settings to a model
```
"""

from slimgrad.hf.tuning.settings import Settings
from slimgrad.hf.tuning.tune import Tuned, finetune, resume

__all__ = ["Settings", "Tuned", "finetune", "resume"]
