"""Which derivatives a call has: the argument `differentiation`, its default, and what names it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, Literal, TypeVar, cast, get_args

import jax

from jax_gluon._errors import Checker
from jax_gluon._thread_contexts import thread_context

Differentiation = Literal["reverse", "any"]
DIFFERENTIATIONS: tuple[Differentiation, ...] = get_args(Differentiation)

_Tree = TypeVar("_Tree")

_MESSAGE = (
    "jax_gluon: forward-mode or second derivatives of attention with "
    'differentiation="reverse"; allowed: first derivatives in reverse mode, or '
    'differentiation="any", as an argument or by `with '
    'jax_gluon.default_differentiation("any"):`.'
)


_default = thread_context("reverse")


@contextlib.contextmanager
def default_differentiation(differentiation: Differentiation) -> Generator[None]:
    """The `differentiation` of calls, in a `with` block, that do not say one.

    It is for code that can't be edited. What counts is where a call is traced: a jitted function
    that was called before is traced again in the block by JAX 0.8 or newer; older JAX keeps the
    program that it has.

    **Arguments:**

    - `differentiation`: `"reverse"` or `"any"`; see `dot_product_attention`.

    **Raises:** `ValueError` for another.

    >>> import jax, jax.numpy as jnp, jax_gluon
    >>> x = jnp.ones((1, 4, 2, 8))
    >>> with jax_gluon.default_differentiation("any"):
    ...     out, tangent = jax.jvp(lambda q: jax_gluon.dot_product_attention(q, x, x), (x,), (x,))
    >>> tangent.shape
    (1, 4, 2, 8)
    """
    check = Checker("default_differentiation")
    with _default(differentiation_of(check, differentiation)):
        yield


def differentiation_of(check: Checker, differentiation: Any) -> Differentiation:
    """The argument, or the default where it is None."""
    check.name("differentiation", differentiation, DIFFERENTIATIONS)
    return cast(Differentiation, differentiation or _default.value)


@jax.custom_jvp
def _once(tree: Any) -> Any:
    return tree


@_once.defjvp
def _refuse(*_: Any) -> Any:
    raise TypeError(_MESSAGE)


def not_differentiated(tree: _Tree) -> _Tree:
    """The arrays of `tree`, of which derivatives are an error that names the argument."""
    return cast(_Tree, _once(tree))


@contextlib.contextmanager
def naming_the_argument() -> Generator[None]:
    """What JAX says of a `custom_vjp` in forward mode does not say what to do."""
    try:
        yield
    except TypeError as error:
        if "to a custom_vjp function" not in str(error):
            raise
        raise TypeError(_MESSAGE) from error
