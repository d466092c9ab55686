"""From bytes to a plan: what a chunk takes is measured, and the fastest way to spend the memory that was stated chosen.

`probe` measures, `fit` extends what was measured to other sizes, `choose` looks through the ways, `planning` is what
the public functions call. A `Plan` is a value, with its account.
"""

from slimgrad.sweep.schedules.default import choose_schedule

__all__ = ["choose_schedule"]
