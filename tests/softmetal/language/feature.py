"""One small kernel with a known answer: a row of the tables of features beside this file."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

LANGUAGE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Feature:
    """A kernel, its arguments and its answers."""

    name: str
    kernel: str  # "file:function"
    expected: Sequence  # of buffers 0, 1, ...
    inputs: Sequence = ()  # the buffers after those
    threads: tuple[int, ...] = (1,)  # of the grid
    threadgroup: tuple[int, ...] | None = None  # threads of a threadgroup; the grid unless given
    constants: Mapping = dataclasses.field(default_factory=dict)
    threadgroup_memory: Mapping = dataclasses.field(default_factory=dict)
    initial: Sequence | None = None  # of the output buffers; filled with 0xCD unless given
    rtol: float = 0.0
    atol: float = 0.0
    values: Callable | None = None  # of an output buffer, where numpy lacks its type


@functools.lru_cache
def library(file: str):
    """The kernels of a file beside this one."""
    import softmetal

    return softmetal.Library(str(LANGUAGE / f"{file}.metal"))


def run(feature: Feature) -> None:
    """Raises where the feature's answers are not what they must be."""
    file, function = feature.kernel.split(":")
    kernel = library(file).kernel(function, constants=feature.constants)
    start = feature.initial or [None] * len(feature.expected)
    outputs = []
    for want, initial in zip(feature.expected, start, strict=True):
        want = np.asarray(want)
        poison = np.full(want.nbytes, 0xCD, np.uint8).view(want.dtype).reshape(want.shape)
        outputs.append(poison if initial is None else np.array(initial))
    inputs = [None if x is None else np.array(x) for x in feature.inputs]
    threadgroup = feature.threadgroup or feature.threads
    grid = tuple(t // g for t, g in zip(feature.threads, threadgroup, strict=True))
    kernel(
        grid=grid,
        threads=threadgroup,
        buffers=outputs + inputs,
        threadgroup_memory=feature.threadgroup_memory,
    )
    values = feature.values or (lambda x: x)
    for got, want in zip(outputs, feature.expected, strict=True):
        np.testing.assert_allclose(
            values(got), values(np.asarray(want)), rtol=feature.rtol, atol=feature.atol
        )


def rng():
    """Random numbers, the same in every run."""
    return np.random.default_rng(7)


def f32(*values):
    """An array of floats."""
    return np.array(values, np.float32)


def i32(*values):
    """An array of ints."""
    return np.array(values, np.int32)


def u32(*values):
    """An array of uints."""
    return np.array(values, np.uint32)


def to_bfloat(x):
    """The nearest bfloat of each number, ties to even, as bits."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded >> 16).astype(np.uint16)


def from_bfloat(bits):
    """The float of each bfloat, given as bits."""
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)
