"""Which tokens of a sequence each device has, and arrays put into that order and back.

A causal mask leaves the first tokens little to do and the last ones much. Devices have equal work
where each has tokens from both ends (zigzag), or every P-th token (striped).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_gluon._errors import Checker
from jax_gluon._typing import Array, Shaped

#: "zigzag" is known as dual chunk swap too. "given": tokens stand where positions say.
TokenLayout = Literal["contiguous", "zigzag", "striped", "given"]
TOKEN_LAYOUTS: tuple[TokenLayout, ...] = get_args(TokenLayout)
#: Layouts that are an order of the tokens.
_ORDERS = ("contiguous", "zigzag", "striped")


class Stretch(NamedTuple):
    """Positions `start`, `start + step`, ..., of which there are `size`."""

    start: int
    size: int
    step: int

    @property
    def last(self) -> int:
        return self.start + (self.size - 1) * self.step


def stretches(layout: TokenLayout, shard: int, shards: int, tokens: int) -> list[Stretch]:
    """The positions of a shard's `tokens` tokens, in their order."""
    if layout == "striped":
        return [Stretch(shard, tokens, shards)]
    if layout == "zigzag":
        chunk = tokens // 2
        starts = shard * chunk, (2 * shards - 1 - shard) * chunk
        return [Stretch(start, chunk, 1) for start in starts]
    return [Stretch(shard * tokens, tokens, 1)]


def positions(layout: TokenLayout, shard: int | jax.Array, shards: int, tokens: int) -> jax.Array:
    """The same as an array, int32 `[tokens]`, of a shard that may be traced."""
    index = jnp.arange(tokens, dtype=jnp.int32)
    if layout == "striped":
        return index * shards + shard
    if layout == "zigzag":
        chunk = tokens // 2
        return jnp.where(
            index < chunk, index + shard * chunk, index + (2 * shards - 2 - shard) * chunk
        )
    return index + shard * tokens


def check_tokens(
    check: Checker, argument: str, layout: TokenLayout, tokens: int, shards: int
) -> None:
    """A zigzag shard is two chunks."""
    if layout == "zigzag" and tokens % 2:
        found = f"of {tokens} tokens on each of {shards} devices"
        allowed = f'an even number of them, a multiple of {2 * shards} in all, for "zigzag"'
        check.value_error(argument, found, allowed)


def layout_of(check: Checker, argument: str, layout: Any) -> TokenLayout:
    """One of `TOKEN_LAYOUTS`."""
    if layout is None:
        check.value_error(argument, "None", ", ".join(f'"{name}"' for name in TOKEN_LAYOUTS))
    check.name(argument, layout, TOKEN_LAYOUTS)
    return layout


def reorder_tokens(
    x: Shaped[ArrayLike, "*axes"],
    shards: int,
    token_layout: Literal["contiguous", "zigzag", "striped"],
    *,
    axis: int = 1,
) -> Shaped[Array, "*axes"]:
    """`x` with its tokens in the order in which `shards` devices of equal work have them.

    Device r of P then has the r-th of P equal parts. "zigzag": of 2P chunks those with numbers r
    and 2P - 1 - r (dual chunk swap). "striped": tokens r, r + P, r + 2P, ... (Striped Attention,
    https://arxiv.org/abs/2311.09431). "contiguous" changes nothing. Whatever goes with tokens is
    to be reordered alike: labels, segment ids, positions; where a model rotates by position, those
    are `reorder_tokens(jnp.arange(T), shards, token_layout, axis=0)`.

    **Arguments:**

    - `x`: an array with T tokens along `axis`.
    - `shards`: P, the number of devices along the axis of the mesh.
    - `token_layout`: `"contiguous"`, `"zigzag"` (2P divides T) or `"striped"` (P divides T).
    - `axis`: of the tokens.

    **Returns:** an array like `x`; `restore_tokens` is its inverse.

    **Raises:** `ValueError` or `TypeError` that names the argument, what was found and is allowed.

    >>> import jax.numpy as jnp, jax_gluon
    >>> jax_gluon.reorder_tokens(jnp.arange(8), 2, "zigzag", axis=0).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
    >>> jax_gluon.reorder_tokens(jnp.arange(8), 2, "striped", axis=0).tolist()
    [0, 2, 4, 6, 1, 3, 5, 7]
    """
    return _permuted(Checker("reorder_tokens"), x, shards, token_layout, axis, False)


def restore_tokens(
    x: Shaped[ArrayLike, "*axes"],
    shards: int,
    token_layout: Literal["contiguous", "zigzag", "striped"],
    *,
    axis: int = 1,
) -> Shaped[Array, "*axes"]:
    """The inverse of `reorder_tokens`.

    **Arguments:** those of `reorder_tokens`.

    **Raises:** as `reorder_tokens`.

    >>> import jax.numpy as jnp, jax_gluon
    >>> x = jax_gluon.reorder_tokens(jnp.arange(12), 3, "zigzag", axis=0)
    >>> jax_gluon.restore_tokens(x, 3, "zigzag", axis=0).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    """
    return _permuted(Checker("restore_tokens"), x, shards, token_layout, axis, True)


def _permuted(
    check: Checker,
    x: Any,
    shards: Any,
    layout: Any,
    axis: int,
    is_inverse: bool,
) -> jax.Array:
    array = check.array("x", x)
    P = check.integer("shards", shards, 1, "an int of at least 1")
    if layout is None:
        check.value_error("token_layout", "None", ", ".join(f'"{name}"' for name in _ORDERS))
    check.name("token_layout", layout, _ORDERS)
    if not -array.ndim <= axis < array.ndim:
        allowed = f"an axis of an array of rank {array.ndim}"
        check.value_error("axis", f"{axis}", allowed)
    axis %= array.ndim
    T = array.shape[axis]
    if layout == "contiguous":
        return array
    if T % (2 * P if layout == "zigzag" else P):
        allowed = f"a multiple of {2 * P if layout == 'zigzag' else P} tokens"
        check.value_error("x", f"of {T} tokens along axis {axis}", allowed)
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    if layout == "zigzag":
        order = np.asarray([chunk for r in range(P) for chunk in (r, 2 * P - 1 - r)])
        cut = array.reshape(*before, 2 * P, T // (2 * P), *after)
        cut = jnp.take(cut, np.argsort(order) if is_inverse else order, axis=axis)
    else:
        parts = (P, T // P) if is_inverse else (T // P, P)
        cut = jnp.swapaxes(array.reshape(*before, *parts, *after), axis, axis + 1)
    return cut.reshape(array.shape)
