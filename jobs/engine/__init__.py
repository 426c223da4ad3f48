"""From a job to a DeepSpeed engine: the only package that imports deepspeed.

DeepSpeed does the pipeline schedule, ZeRO, mixed precision, clipping and the learning rate. What is ours: the layers,
which stage runs which, that the loss is an exact mean over the real tokens of the step under any plan, and marks on the
parameters without which DeepSpeed's gradient norm is wrong.
"""

from __future__ import annotations

from jobs.engine.core import Engine, MicroBatch, StepResult

__all__ = ["Engine", "MicroBatch", "StepResult"]
