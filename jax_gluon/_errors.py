"""Checks of arguments, and the one wording of what is wrong with them."""

from __future__ import annotations

import dataclasses
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jax_gluon._dimensions import is_static, number

FLOATS = ("float32", "bfloat16", "float16", "float64")

# NumPy's scalars beside Python's, as `Any`: their own generic types say nothing here.
_ARRAYS: Any = (jax.Array, np.ndarray, np.generic)
_BOOLS: Any = (bool, np.bool_)
_INTEGERS: Any = (int, np.integer)
_NUMBERS: Any = (numbers.Real, np.number)
_NOT_REAL: Any = (bool, np.bool_, np.complexfloating)
_INT32_MAX = int(np.iinfo(np.int32).max)


@dataclasses.dataclass(frozen=True)
class Checker:
    """Checks the arguments of the public function of this name.

    Every complaint says function, argument, what was found and what is allowed.
    """

    function: str

    def text(self, argument: str, found: str, allowed: str) -> str:
        """The complaint about an argument."""
        return f"jax_gluon.{self.function}: {argument} is {found}; allowed: {allowed}."

    def type_error(self, argument: str, found: str, allowed: str) -> NoReturn:
        """Raise `TypeError`."""
        raise TypeError(self.text(argument, found, allowed))

    def value_error(self, argument: str, found: str, allowed: str) -> NoReturn:
        """Raise `ValueError`."""
        raise ValueError(self.text(argument, found, allowed))

    def not_available(self, argument: str, found: str, allowed: str) -> NoReturn:
        """Raise `NotImplementedError`."""
        raise NotImplementedError(self.text(argument, found, allowed))

    def array(self, argument: str, x: Any) -> jax.Array:
        """`x` as an array."""
        try:
            array = jnp.asarray(x)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise TypeError(
                self.text(argument, f"a {type(x).__name__} ({error})", "an array or a list")
            ) from error
        # Python numbers leave a weak type, which would change what the dtype means later on.
        return jax.lax.convert_element_type(array, array.dtype)

    def float_array(self, argument: str, x: Any) -> jax.Array:
        """`x` as an array of one of `FLOATS`."""
        array = self.array(argument, x)
        if array.dtype.name not in FLOATS:
            self.type_error(argument, f"of dtype {array.dtype.name}", ", ".join(FLOATS))
        return array

    def visibility(self, argument: str, x: Any) -> jax.Array:
        """`x` as a bool array, of bools or of integers."""
        array = self.array(argument, x)
        if jnp.issubdtype(array.dtype, jnp.integer):
            array = array != 0
        if array.dtype != jnp.bool_:
            allowed = "bool (True: visible), or an integer dtype (nonzero: visible)"
            self.type_error(argument, f"of dtype {array.dtype.name}", allowed)
        return array

    def float_dtype(self, argument: str, dtype: Any) -> np.dtype[Any]:
        """One of `FLOATS`."""
        try:
            found: np.dtype[Any] | None = np.dtype(dtype)
        except TypeError:
            found = None
        if found is None or dtype is None or found.name not in FLOATS:
            self.type_error(argument, f"{dtype!r}", ", ".join(FLOATS))
        return found

    def flag(self, argument: str, x: Any) -> bool:
        """`x` as a bool; anything else, a traced bool included, is a `TypeError`."""
        if not isinstance(x, _BOOLS):
            self.type_error(argument, f"a {type(x).__name__}", "True or False")
        return bool(x)

    def number(self, argument: str, x: Any) -> float:
        """A real number as a float."""
        number = x[()] if getattr(x, "ndim", None) == 0 else x
        if not isinstance(number, _NUMBERS) or isinstance(number, _NOT_REAL):
            self.type_error(argument, f"a {type(x).__name__}", "a real Python or NumPy number")
        return float(number)

    def integer(self, argument: str, x: Any, minimum: int, allowed: str) -> int:
        """An int of at least `minimum`; `allowed` says so in words."""
        if isinstance(x, _BOOLS) or not isinstance(x, _INTEGERS):
            self.type_error(argument, f"{x!r}", allowed)
        if x < minimum:
            self.value_error(argument, f"{x}", allowed)
        return operator.index(x)

    def even_head_dim(self, argument: str, head_dim: int) -> None:
        """Two codes of 4 bits share a byte."""
        if head_dim % 2:
            allowed = "an even head dim, which 4 bits need"
            self.value_error(argument, f"of head dim {head_dim}", allowed)

    def keywords(self, keywords: Any, known: Sequence[str]) -> None:
        """Keywords that the function has."""
        for name in keywords:
            if name not in known:
                raise TypeError(
                    f'jax_gluon.{self.function}: unexpected keyword argument "{name}"; allowed: '
                    f"{', '.join(known)}."
                )

    def name(self, argument: str, x: Any, known: Sequence[str], *others: str) -> None:
        """None, one of `known`, or what `others` says in words, which the caller has looked for."""
        allowed = ", ".join(["None", *(f'"{name}"' for name in known), *others])
        if x is not None and not isinstance(x, str):
            self.type_error(argument, f"a {type(x).__name__}", allowed)
        if x is not None and x not in known:
            self.value_error(argument, f'"{x}"', allowed)

    def int32(self, argument: str, x: Any) -> jax.Array:
        """Integers as int32; wider ones are taken where their values are at hand and fit."""
        array: Any = x
        if not isinstance(x, _ARRAYS):
            try:
                has_arrays = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x))
                array = jnp.asarray(x) if has_arrays else np.asarray(x)
            except (TypeError, ValueError) as error:
                found = f"a {type(x).__name__} ({error})"
                self.type_error(argument, found, "an array or a list")
            if array.size == 0:
                array = array.astype(np.int32)  # NumPy reads an empty list as floats.
        if not np.issubdtype(array.dtype, np.integer):
            self.type_error(argument, f"of dtype {array.dtype.name}", "an integer dtype")
        if not np.can_cast(array.dtype, np.int32):
            if isinstance(array, jax.Array):
                found = f"of dtype {array.dtype.name}"
                self.type_error(argument, found, "int32: write .astype(jnp.int32)")
            low, high = (int(f(array)) if array.size else 0 for f in (np.min, np.max))
            if low < -_INT32_MAX - 1 or high > _INT32_MAX:
                self.value_error(argument, f"from {low} to {high}", "numbers of 32 bits")
        return jnp.asarray(array).astype(jnp.int32)

    def lengths(self, argument: str, lengths: Any, shape: tuple[int, ...], limit: int) -> jax.Array:
        """Integers of any dtype as int32, clamped to `[0, limit]` before they are narrowed."""
        array = self._any_integers(argument, lengths)
        if array.shape != shape:
            allowed = f"shape [B] = {list(shape)}" if shape else "a scalar"
            self.value_error(argument, f"of shape {list(array.shape)}", allowed)
        if not is_static(limit):
            return jnp.minimum(self._clipped(array, _INT32_MAX), number(limit))
        return self._clipped(array, limit)

    def narrow_lengths(self, argument: str, lengths: Any) -> jax.Array:
        """The same of any shape and of unknown limit."""
        return self._clipped(self._any_integers(argument, lengths), _INT32_MAX)

    def _any_integers(self, argument: str, lengths: Any) -> Any:
        array: Any = lengths
        if not isinstance(lengths, _ARRAYS):
            leaves: list[Any] = jax.tree.leaves(lengths)
            try:
                if any(isinstance(x, jax.Array) for x in leaves):
                    array = jnp.asarray(lengths)
                else:
                    array = np.asarray(lengths)
            except (TypeError, ValueError) as error:
                found = f"a {type(lengths).__name__} ({error})"
                self.type_error(argument, found, "an array or a list")
            if not leaves:
                array = array.astype(np.int32)  # NumPy reads an empty list as floats.
            elif all(type(x) is int for x in leaves):
                array = np.clip(array, 0, _INT32_MAX).astype(np.int64)
        if not np.issubdtype(array.dtype, np.integer):
            self.type_error(argument, f"of dtype {array.dtype.name}", "an integer dtype")
        return array

    def _clipped(self, array: Any, limit: int) -> jax.Array:
        clip = jnp.clip if isinstance(array, jax.Array) else np.clip
        limit = min(limit, int(np.iinfo(array.dtype).max))
        return jnp.asarray(clip(array, 0, limit).astype(np.int32))
