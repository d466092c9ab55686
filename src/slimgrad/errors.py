"""Every error that slimgrad raises on purpose.

```
Exception
└── SlimgradError
    ├── InputError(ValueError)       what the caller passed does not fit: shape, dtype, option, file
    │   └── MissingExtraError(ImportError)  what was asked for needs packages that are not installed
    ├── ModelError(TypeError)        the model does not follow the protocol of a causal step
    ├── SweepError(RuntimeError)     the sweep cannot go on and stay exact
    │   ├── StateMismatchError       a rebuilt state differs in bits from the one the forward sweep saw
    │   ├── LossMismatchError        a chunk's loss came out differently in the sweep that differentiates it
    │   ├── NonFiniteError           a NaN or an infinity reached a sum
    │   └── ConsumedError            a run that was already reversed, or whose parameters changed since
    └── RunError(RuntimeError)       a run cannot go on; what was there before is as it was
        ├── StorageError             a file (a snapshot, kept states) cannot be written, or read back as it was
        └── MemoryLimitError         the memory that was stated is not enough
```

Each message says what was expected, what came, and what to do about it.
"""


class SlimgradError(Exception):
    """Root of the tree: catch this to catch everything below."""


class InputError(SlimgradError, ValueError):
    """What the caller passed does not fit."""


class MissingExtraError(InputError, ImportError):
    """What was asked for needs packages that `pip install slimgrad` leaves out, and that are not installed."""


class ModelError(SlimgradError, TypeError):
    """The model does not follow the protocol of a causal step."""


class SweepError(SlimgradError, RuntimeError):
    """The sweep cannot go on and stay exact."""


class StateMismatchError(SweepError):
    """A rebuilt state differs in bits from the one the forward sweep saw."""


class LossMismatchError(SweepError):
    """A chunk's loss came out differently in the sweep that differentiates it."""


class NonFiniteError(SweepError):
    """A NaN or an infinity reached a `PrefixSum`."""


class ConsumedError(SweepError):
    """The run was already reversed, or what it needs has changed since its forward sweep."""


class RunError(SlimgradError, RuntimeError):
    """A run cannot go on: of training, whose snapshots are as they were, or of one gradient, and `.grad` is."""


class StorageError(RunError):
    """A file cannot be written, or read back as it was: of a run, or of the states that a schedule keeps on disk."""


class MemoryLimitError(RunError):
    """The memory that was stated is not enough."""
