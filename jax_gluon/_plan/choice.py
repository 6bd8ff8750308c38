"""Which kernels a call gets: as asked for, as the environment says, as measured, or by default."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any, get_args

from jax_gluon import _ffi, _native
from jax_gluon._errors import Checker
from jax_gluon._kernels import (
    CpuKernel,
    Device,
    Kernels,
    KernelWish,
    KernelWishes,
    MetalKernel,
    Pass,
    PassKernels,
)
from jax_gluon._plan import tuned_table
from jax_gluon._plan.selection import (
    PIPELINES,
    KernelOffer,
    KernelProblem,
    SizeRange,
    select_kernel,
)
from jax_gluon._problem import AttentionProblem, Operands
from jax_gluon._quantization.formats import QuantizedTensor

ENVIRONMENT = "JAX_GLUON_KERNEL"
_PASSES: tuple[Pass, ...] = get_args(Pass)


def kernels_of(
    check: Checker, problem: AttentionProblem, operands: Operands, wishes: KernelWishes
) -> PassKernels:
    """The kernels of all passes, for the devices that a call may run on.

    **Raises:** `ValueError` where a device has no such kernel for the problem, and where the
    environment variable JAX_GLUON_KERNEL names none.
    """
    devices = _devices(problem)
    query = KernelQuery.of(problem, operands)
    min_products = -1 if len(devices) == 1 else min_products_of(problem, operands)[0]

    def chosen(direction: Pass) -> Kernels:
        kernels: dict[str, Any] = {
            device: choose_kernel(check, query, direction, device, wishes)[0] for device in devices
        }
        return Kernels(**kernels, metal_min_products=min_products)

    return PassKernels(*map(chosen, _PASSES))


def choose_kernel(
    check: Checker, query: KernelQuery, direction: Pass, device: Device, wishes: KernelWishes
) -> tuple[CpuKernel | MetalKernel, str]:
    """The kernel of a pass on a device, and why."""
    problem, offers = query.offers(direction, device)
    if not offers:  # of an instruction set that there is not: the call says so
        return CpuKernel("baseline"), "baseline: the device has no kernels"
    wish = _wish_of(wishes, direction)
    if (device == "cpu" and isinstance(wish, MetalKernel)) or (
        device == "metal" and isinstance(wish, CpuKernel)
    ):
        wish = None
    if wish is not None:
        name = wish if isinstance(wish, str) else wish.name
        offer = next((offer for offer in offers if offer.name == name), None)
        # A wish that is not for backward alone need not be one of its kernels.
        is_given = direction == "forward" or isinstance(wishes, tuple)
        if offer is None and is_given:
            _refuse(check, wish, direction, device, offers)
        if offer is not None:
            kernel = offer.kernel() if isinstance(wish, str) else _sized(wish, offer)
            if not offer.takes(kernel):
                _refuse(check, wish, direction, device, offers)
            return kernel, f"{name}: asked for by kernel={_shown(wish)}"
    elif direction != "backward_bias" and (given := os.environ.get(ENVIRONMENT)):
        if given not in PIPELINES:
            names = ", ".join(f'"{name}"' for name in PIPELINES)
            raise ValueError(f'jax_gluon: {ENVIRONMENT} is "{given}"; allowed: {names}.')
        offer = next(offer for offer in offers if offer.name == given)
        return offer.kernel(), f"{given}: {ENVIRONMENT} says so"
    return select_kernel(problem, offers, tuned_table.measured(device).rows)


#: More work than any call's.
_NEVER = 2**63 - 1


def min_products_of(problem: AttentionProblem, operands: Operands) -> tuple[int, str]:
    """From how many multiply-accumulates on a call goes to Metal, -1 by default; and why."""
    name = _operands_name(problem, operands)
    for each in tuned_table.measured("metal").crossovers:
        if each.operands != name:
            continue
        if each.min_products is None:
            why = f"{name} is not faster there up to {each.max_products}, as measured here"
            return _NEVER, why
        return each.min_products, f"from {each.min_products} on, as measured here for {name}"
    default: int = _native.plugin().METAL_MIN_PRODUCTS
    return -1, f"from {default} on by default; `jax-gluon tune --device metal` measures it"


def _wish_of(wishes: KernelWishes, direction: Pass) -> KernelWish | None:
    """The wish for a pass. Sizes that are given without a pair are forward's."""
    if direction == "backward_bias":
        return None
    if isinstance(wishes, tuple):
        return wishes[direction == "backward"]
    if isinstance(wishes, CpuKernel) and direction == "backward":
        return CpuKernel(wishes.name)
    return wishes


def _sized(wish: CpuKernel | MetalKernel, offer: KernelOffer) -> CpuKernel | MetalKernel:
    if isinstance(wish, MetalKernel):
        return wish
    return offer.kernel(block_k=wish.block_k, subtile=wish.subtile, stages=wish.stages)


def _shown(wish: KernelWish) -> str:
    return f'"{wish}"' if isinstance(wish, str) else f"{wish}"


def _refuse(
    check: Checker,
    wish: KernelWish,
    direction: Pass,
    device: Device,
    offers: tuple[KernelOffer, ...],
) -> None:
    has = ", ".join(map(str, offers))
    check.value_error("kernel", _shown(wish), f"{direction} on {device} has {has} for this problem")


def _devices(problem: AttentionProblem) -> list[Device]:
    """The devices that a call may run on."""
    if problem.implementation == "metal":
        return ["metal"]
    is_open = problem.implementation is None
    return ["cpu", "metal"] if is_open and _native.takes_metal() else ["cpu"]


@dataclass(frozen=True)
class KernelQuery:
    """What a problem tells the plugin, which then says what kernels it has."""

    numbers: tuple[tuple[str, int], ...]
    names: tuple[tuple[str, str], ...]
    operands: str
    H: int

    @staticmethod
    def of(problem: AttentionProblem, operands: Operands) -> KernelQuery:
        """The query for a problem."""
        numbers, names = _ffi.kernel_query(problem, operands)
        return KernelQuery(
            tuple(numbers.items()),
            tuple(names.items()),
            _operands_name(problem, operands),
            operands.query.shape[-1],
        )

    def offers(
        self, direction: Pass, device: Device
    ) -> tuple[KernelProblem, tuple[KernelOffer, ...]]:
        """What the choice depends on, and what a device has for the problem."""
        # The environment chooses the CPU's instruction set, call by call.
        return _find_offers(self, direction, device, os.environ.get("JAX_GLUON_CPU_ISA"))


@functools.lru_cache(maxsize=1024)
def _find_offers(
    query: KernelQuery, direction: Pass, device: Device, _isa: str | None
) -> tuple[KernelProblem, tuple[KernelOffer, ...]]:
    plugin = _native.plugin()
    numbers, names = dict(query.numbers), dict(query.names)
    offers = tuple(
        KernelOffer(
            device,
            name,
            arithmetic,
            reason,
            {size: SizeRange(*values) for size, values in sizes.items()},
        )
        for name, arithmetic, reason, sizes in plugin.offers(device, direction, numbers, names)
    )
    visible_keys = plugin.max_visible_keys(numbers, names)
    problem = KernelProblem(
        direction, query.operands, visible_keys, numbers["T"], numbers["S"], query.H
    )
    return problem, offers


def _operands_name(problem: AttentionProblem, operands: Operands) -> str:
    """`KernelProblem.operands` of a problem."""
    specs = [
        x.spec if isinstance(x, QuantizedTensor) else spec
        for x, spec in zip(operands[:3], problem.quantization, strict=True)
    ]
    bits = [spec.bits for spec in specs if spec is not None]
    if not bits:
        return operands.query.dtype.name
    return f"int{min(bits)}" if len(bits) == 3 else "float32"
