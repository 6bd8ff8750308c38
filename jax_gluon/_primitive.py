"""JAX's primitives without `jax.extend`, whose import takes 50 ms: it brings Pallas along."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import jax

if TYPE_CHECKING:
    from jax.extend.core import Primitive as Primitive
else:
    Primitive: Any = type(jax.lax.add_p)


def jaxpr_as_fun(jaxpr: Any) -> Any:
    """The function that a closed jaxpr is."""
    from jax.extend import core

    return cast(Any, core).jaxpr_as_fun(jaxpr)
