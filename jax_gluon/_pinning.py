"""Arrays that many calls read, lent to the GPU once."""

from __future__ import annotations

from types import TracebackType
from typing import Any, cast

import jax
import numpy as np
from jax.core import Tracer

from jax_gluon import _native
from jax_gluon._errors import Checker

_TRACER: Any = Tracer


class Pin:
    """Arrays that `pin` keeps lent to the GPU; a context manager that lets them go at its end."""

    def __init__(self, arrays: list[jax.Array]) -> None:
        self._pins: list[int] = []
        # The views keep the memory: neither deletion nor donation takes it away under the GPU.
        self._views: list[np.ndarray[Any, Any]] = []
        try:
            for array in arrays:
                for shard in array.addressable_shards:
                    self._add(shard.data)
        except BaseException:
            self.release()
            raise

    def _add(self, array: jax.Array) -> None:
        view = np.asarray(array)
        if view.nbytes == 0:
            return
        number, why = _native.plugin().metal_pin(view.ctypes.data, view.nbytes)
        if number == 0:
            raise RuntimeError(f"jax_gluon.pin: {why}.")
        self._pins.append(number)
        self._views.append(view)

    @property
    def nbytes(self) -> int:
        """Bytes that are pinned; 0 after `release`."""
        return sum(view.nbytes for view in self._views)

    @property
    def uses(self) -> int:
        """How many operands of calls have been read from these arrays; 0 after `release`."""
        return sum(_native.plugin().metal_pin_uses(number) for number in self._pins)

    def release(self) -> None:
        """Lets the arrays go; calls that run keep what they use. A second time does nothing."""
        for number in self._pins:
            _native.plugin().metal_unpin(number)
        self._pins.clear()
        self._views.clear()

    def __enter__(self) -> Pin:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def pin(tree: Any) -> Pin:
    """Keep the arrays of a pytree lent to the Metal GPU until they are released.

    Without it, each call lends its operands to the GPU anew, which costs time for every page of
    them. With it, calls of `implementation="metal"` find what they read in these arrays: weights, a
    cache of keys and values that stays what it is, `QuantizedTensor`s. Results are as without.

    The arrays keep their memory until `release`, the end of the `with` block, or the end of the
    `Pin`: one that is deleted or donated meanwhile is copied by JAX where it has to change.

    **Arguments:**

    - `tree`: a pytree of `jax.Array`s on JAX's CPU platform, of any dtype and shape.

    **Returns:** a `Pin`.

    **Raises:** `TypeError` for a leaf that is no `jax.Array`; `ValueError` for one of another
    platform; `RuntimeError` where there is no Metal device, or no memory.

    >>> import jax, jax_gluon
    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 64, 4, 32))
    >>> with jax_gluon.pin((key, value)) as pinned:
    ...     out = jax_gluon.dot_product_attention(query, key, value, implementation="metal")
    ...     out = jax.block_until_ready(out)
    ...     pinned.uses
    2
    """
    name, why = _native.metal_device()
    if not name:
        raise RuntimeError(f"jax_gluon.pin: {why}; allowed: calls where there is a Metal device.")
    check = Checker("pin")
    arrays: list[jax.Array] = []
    for path, leaf in cast(Any, jax.tree_util).tree_leaves_with_path(tree):
        name = "tree" + jax.tree_util.keystr(path)
        is_array = isinstance(leaf, jax.Array) and not isinstance(leaf, _TRACER)
        if not is_array:
            check.type_error(name, f"a {type(leaf).__name__}", "jax.Array, outside of jit")
        array: jax.Array = leaf
        platforms = {device.platform for device in array.devices()}
        if platforms != {"cpu"}:
            check.value_error(name, f"on {', '.join(sorted(platforms))}", "cpu")
        arrays.append(array)
    return Pin(arrays)
