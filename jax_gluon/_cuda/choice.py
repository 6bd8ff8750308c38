"""What runs a problem on an NVIDIA GPU, and why."""

from __future__ import annotations

from typing import Literal

from jax_gluon._cuda import cudnn, int8
from jax_gluon._problem import AttentionProblem, Operands

Choice = Literal["cudnn", "pallas", "xla"]
#: What can be asked for, on NVIDIA GPUs alone.
IMPLEMENTATIONS = ("cudnn", "pallas")
# From so many rows and keys on both passes took less time than with cuDNN's forward of what the
# codes stand for (docs/nvidia.md).
_LEAST_TOKENS = 4096


def refusal(problem: AttentionProblem, operands: Operands) -> str | None:
    """Why what `problem.implementation` asks for does not take the problem, or None."""
    if problem.implementation == "pallas":
        return int8.missing() or int8.refusal(problem, operands)
    return cudnn.missing() or cudnn.refusal(problem, operands)


def chosen(problem: AttentionProblem, operands: Operands) -> tuple[Choice, str]:
    """What takes the problem where nothing was asked for, and the reason."""
    if (reason := cudnn.missing() or cudnn.refusal(problem, operands)) is not None:
        return "xla", reason
    T, S = operands.query.shape[1], operands.key.shape[1]
    if min(T, S) >= _LEAST_TOKENS and not (int8.missing() or int8.refusal(problem, operands)):
        return "pallas", f"INT8 codes of at least {_LEAST_TOKENS} tokens, on a Hopper GPU"
    return "cudnn", "cuDNN takes the problem, where the GPU is NVIDIA's"
