"""Kernels by name: what a caller asks for, and what a call carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

KernelName = Literal["baseline", "gluon", "decode", "small"]
KERNEL_NAMES: tuple[KernelName, ...] = get_args(KernelName)
Device = Literal["cpu", "metal"]
Pass = Literal["forward", "backward", "backward_bias"]


@dataclass(frozen=True)
class CpuKernel:
    """A kernel of the CPU, and the sizes of its blocks, in keys.

    - `name`: `"baseline"` loads a block of keys, then uses it; `"gluon"` fills blocks ahead of
      their use and takes the softmax in subtiles; `"decode"`, for few queries, splits the keys;
      `"small"` takes heads of few keys in one piece.
    - `block_k`: keys that are loaded at a time.
    - `subtile`: keys that share a step of the softmax; in backward, whose P and dP are kept at a
      time. Gluon alone has subtiles, at least two in a block; of codes forward's are fixed.
    - `stages`: blocks of gluon's ring.

    None takes what the kernel prefers. Which kernels and sizes there are depends on the problem and
    on the instruction set; an error lists them. See `dot_product_attention`, `kernel=`.

    >>> import jax.numpy as jnp
    >>> import jax_gluon
    >>> x = jnp.ones((1, 300, 1, 64))
    >>> kernel = jax_gluon.CpuKernel("gluon", block_k=256, stages=3)
    >>> jax_gluon.dot_product_attention(x, x, x, kernel=kernel).shape
    (1, 300, 1, 64)
    """

    name: KernelName
    block_k: int | None = None
    subtile: int | None = None
    stages: int | None = None


@dataclass(frozen=True)
class MetalKernel:
    """A kernel of Metal; its sizes are compiled in.

    - `name`: as of `CpuKernel`; Metal has no `"small"`.

    >>> import jax_gluon
    >>> jax_gluon.MetalKernel("gluon")
    MetalKernel(name='gluon')
    """

    name: KernelName


#: What a caller may ask for: a kernel by name on any device, or one of a device; for both passes,
#: or for forward and for backward.
KernelWish = KernelName | CpuKernel | MetalKernel
KernelWishes = KernelWish | tuple[KernelWish | None, KernelWish | None] | None


class Kernels(NamedTuple):
    """A kernel for each device that a call may run on.

    `metal_min_products` are the multiply-accumulates from which a call that may run on either goes
    to Metal, as they were measured; -1 where nothing was.
    """

    cpu: CpuKernel = CpuKernel("baseline")
    metal: MetalKernel = MetalKernel("baseline")
    metal_min_products: int = -1


class PassKernels(NamedTuple):
    """The kernels of each pass."""

    forward: Kernels = Kernels()
    backward: Kernels = Kernels()
    backward_bias: Kernels = Kernels()
