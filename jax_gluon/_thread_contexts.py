"""Values that hold in a `with` block of one thread, and of which compiled programs know."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from typing import Any

import jax

# Younger than the oldest JAX that is supported.
_make_context: Any = getattr(jax, "make_user_context", None)

#: Whether `jax.jit` traces a function again where a value differs from that of its last call.
TRACES_AGAIN = _make_context is not None


class _ThreadContext(threading.local):
    """What `jax.make_user_context` is, but that caches of `jax.jit` do not know of it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @contextlib.contextmanager
    def __call__(self, value: Any) -> Generator[None]:
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before


def thread_context(default: Any) -> Any:
    """`context.value` is the default, or `x` in a block `with context(x):` of this thread."""
    return _ThreadContext(default) if _make_context is None else _make_context(default)
