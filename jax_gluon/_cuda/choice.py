"""What runs a problem on an NVIDIA GPU, and why."""

from __future__ import annotations

from typing import Literal

from jax_gluon._cuda import cudnn, int8
from jax_gluon._problem import AttentionProblem, Operands

Choice = Literal["cudnn", "xla"]
#: What can be asked for, on NVIDIA GPUs alone.
IMPLEMENTATIONS = ("cudnn", "pallas")


def refusal(problem: AttentionProblem, operands: Operands) -> str | None:
    """Why what `problem.implementation` asks for does not take the problem, or None."""
    if problem.implementation == "pallas":
        return int8.missing() or int8.refusal(problem, operands)
    return cudnn.missing() or cudnn.refusal(problem, operands)


def chosen(problem: AttentionProblem, operands: Operands) -> tuple[Choice, str]:
    """What takes the problem where nothing was asked for, and the reason."""
    if (reason := cudnn.missing() or cudnn.refusal(problem, operands)) is not None:
        return "xla", reason
    return "cudnn", "cuDNN takes the problem, where the GPU is NVIDIA's"
