"""The releases of JAX that the package runs with, looked at before anything else of it is."""

from __future__ import annotations

import jax

OLDEST_JAX = (0, 5, 0)


def check_jax() -> None:
    """Raises `ImportError` where JAX is too old, in place of whatever would be missing first."""
    if jax.__version_info__ < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        raise ImportError(
            f"jax_gluon needs jax {oldest} or later, found {jax.__version__}: "
            'pip install --upgrade "jax"'
        )


check_jax()
