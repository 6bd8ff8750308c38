"""`patch`: `jax.nn.dot_product_attention` is this package's own, for code that can't be edited."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jax_gluon._arguments import KEYWORDS, Implementation, check_names
from jax_gluon._attention import dot_product_attention
from jax_gluon._bindings import other_holders, rebind
from jax_gluon._derivative_modes import DIFFERENTIATIONS, Differentiation
from jax_gluon._errors import Checker
from jax_gluon._kernels import KernelWishes
from jax_gluon._quantization.formats import AttentionQuantization, Preset
from jax_gluon._thread_contexts import TRACES_AGAIN, thread_context

_CHECK = Checker("patch")
_NAME = "dot_product_attention"
_Function = TypeVar("_Function", bound=Callable[..., Any])


def patch(
    *,
    quantization: Preset | AttentionQuantization | None = None,
    implementation: Implementation | None = None,
    kernel: KernelWishes = None,
    differentiation: Differentiation | None = None,
    strict: bool = False,
) -> Patch:
    """Makes `jax.nn.dot_product_attention` this package's, in a `with` block or a function.

    For code that can't be edited: Keras, `flax.nnx`'s default attention, published models. Names
    that modules bound by `from jax.nn import dot_product_attention` count too, whether they were
    imported before or are within the block; at its end, also by an error, all are as before.

    It holds for the thread that entered the block, and there for what is traced or run in it. Other
    threads meanwhile get JAX's own attention. Blocks nest; the innermost one's options count. A
    jitted function that was called before is traced again in the block, and after it is what it
    was; JAX before 0.8 keeps the program that it has, and the block warns where it saw no call.

    `implementation="xla"` in a call, which Keras passes, means any but cuDNN: the plugin's kernels
    may run. JAX's own attention is left to calls with `implementation="cudnn"`, and to those of
    arguments that `jax_gluon.dot_product_attention` refuses. A row that sees no key gives 0, where
    JAX gives the mean of all values.

    **Arguments:** `quantization`, `implementation`, `kernel` and `differentiation` of every call,
    as `dot_product_attention` has them. With `strict`, what it refuses is an error.

    **Returns:** a `Patch`, for `with`, `contextlib.ExitStack` or above a function.

    **Raises:** `ValueError` or `TypeError` for options that no call takes; `RuntimeError` for a
    device that there is not.

    >>> import jax, jax.numpy as jnp, jax_gluon
    >>> x = jnp.ones((1, 16, 2, 8))
    >>> with jax_gluon.patch(quantization="int8") as patched:
    ...     out = jax.nn.dot_product_attention(x, x, x, implementation="xla")
    >>> [call.reason for call in patched.calls]
    [None]
    """
    check_names(_CHECK, quantization, implementation, kernel)
    _CHECK.name("differentiation", differentiation, DIFFERENTIATIONS)
    strict = _CHECK.flag("strict", strict)
    return Patch(_Options(quantization, implementation, kernel, differentiation, strict))


@dataclasses.dataclass(frozen=True)
class PatchedCall:
    """Calls of `jax.nn.dot_product_attention` that a patch saw, as they ran or were traced.

    - `where`: module and line of the caller.
    - `query`, `key`: dtype and shape, in words.
    - `reason`: None where this package's attention was taken; else why JAX's own was.
    - `count`: how many.
    """

    where: str
    query: str
    key: str
    reason: str | None
    count: int = 1

    def __str__(self) -> str:
        taken = "taken" if self.reason is None else f"left to JAX: {self.reason}"
        return f"{self.where}: query {self.query}, key {self.key}, {self.count} times: {taken}"


@dataclasses.dataclass(frozen=True)
class _Options:
    quantization: Preset | AttentionQuantization | None
    implementation: Implementation | None
    kernel: KernelWishes
    differentiation: Differentiation | None
    strict: bool

    def of_call(self, wished: str | None) -> dict[str, Any]:
        """Keywords of a call that wished for an implementation of JAX's."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del options["strict"]
        # Floats alone go to cuDNN by themselves.
        may_be_cudnn = jax.default_backend() == "gpu" and self.quantization is None
        if wished == "xla" and self.implementation is None and may_be_cudnn:
            options["implementation"] = "xla"
        return options


class Patch(contextlib.ContextDecorator):
    """What `patch` returns: enter it, and ask it what it saw.

    It may be entered again, also within itself. As a decorator it is entered for each call of the
    function.

    - `calls`: the `PatchedCall`s that it saw, all blocks together, equal ones counted as one. A
      program that was compiled before under equal options is not traced again, and its calls are
      not seen again.
    - `left_alone`: in words, which calls went to JAX's own attention and why; and what refers to it
      by other ways than the name of a module, such as a default argument, where no patch reaches.

    >>> import jax, jax.numpy as jnp, jax_gluon
    >>> @jax_gluon.patch()
    ... def attend(x):
    ...     return jax.nn.dot_product_attention(x, x, x)
    >>> attend(jnp.ones((1, 16, 2, 8))).shape
    (1, 16, 2, 8)
    """

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._counts: dict[PatchedCall, int] = {}

    @property
    def calls(self) -> tuple[PatchedCall, ...]:
        """The calls that it saw."""
        with _LOCK:
            counts = tuple(self._counts.items())
        return tuple(dataclasses.replace(call, count=count) for call, count in counts)

    @property
    def left_alone(self) -> tuple[str, ...]:
        """What went, or would go, to JAX's own attention."""
        calls = tuple(str(call) for call in self.calls if call.reason is not None)
        held = other_holders(_SWITCH.own)
        return calls + tuple(f"{words} holds JAX's own" for words in held)

    def __str__(self) -> str:
        taken = (str(call) for call in self.calls if call.reason is None)
        return "\n".join((*taken, *self.left_alone)) or "no call seen"

    def __enter__(self) -> Patch:
        scope = _CONTEXT(self._options)
        scope.__enter__()
        _SWITCH.hold()
        _THREAD.entered.append((self, scope, len(self.calls)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        entered, allowed = _THREAD.entered, "blocks of a thread, in turn"
        own = [i for i, (patched, *_) in enumerate(entered) if patched is self]
        if not own:
            found = "one that this thread has not entered"
            raise RuntimeError(_CHECK.text("the block", found, allowed))
        is_last = own[-1] == len(entered) - 1
        _, scope, seen_before = entered.pop(own[-1])
        _SWITCH.release()
        if not is_last:
            found = "one that ends before another that was entered later"
            raise RuntimeError(_CHECK.text("the block", found, allowed))
        scope.__exit__(kind, error, traceback)
        if kind is None and not TRACES_AGAIN and len(self.calls) == seen_before == 0:
            warnings.warn(
                "jax_gluon.patch saw no call of jax.nn.dot_product_attention; functions that were "
                "jitted and called before are not traced again by this JAX",
                stacklevel=2,
            )

    def __call__(self, func: _Function) -> _Function:
        asks = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
        of_object = getattr(type(func), "__call__", None)  # noqa: B004
        called = func, getattr(func, "func", None), of_object
        if any(ask(each) for ask in asks for each in called):
            name = getattr(func, "__qualname__", repr(func))
            found = f"{name}, whose body runs after its call"
            _CHECK.type_error("the decorated function", found, "one that returns its result")
        return super().__call__(func)

    def attend(self, where: str, arguments: dict[str, Any]) -> tuple[bool, Any]:
        """Whether this package's attention was taken, and its result."""
        wished = arguments.pop("implementation", None)
        query, key = (_in_words(arguments[name]) for name in ("query", "key"))
        attention: Any = dot_product_attention
        out, reason = None, None
        unknown = [name for name in arguments if name not in _KNOWN]
        if wished not in ("xla", None):
            reason = f'implementation="{wished}" was asked for'
        elif unknown:
            reason = f"jax_gluon.{_NAME} has no argument {unknown[0]}"
        else:
            try:
                out = attention(**arguments, **self._options.of_call(wished))
            except (TypeError, ValueError, NotImplementedError) as error:
                if self._options.strict:
                    raise
                reason = str(error)
        call = PatchedCall(where, query, key, reason)
        with _LOCK:
            self._counts[call] = self._counts.get(call, 0) + 1
        return reason is None, out


_KNOWN = ("query", "key", "value", "bias", "mask", "return_residual", *KEYWORDS)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.entered: list[tuple[Patch, Any, int]] = []


class _Switch:
    """JAX's own function, and one in its place while any thread is in a block."""

    def __init__(self) -> None:
        self.own: Any = jax.nn.dot_product_attention
        self._users = 0
        self._instead = _instead_of(self.own)

    def hold(self) -> None:
        with _LOCK:
            self._users += 1
            if self._users == 1:
                found: Any = jax.nn.dot_product_attention
                if found is not self.own:
                    self.own, self._instead = found, _instead_of(found)
                rebind(self.own, self._instead)

    def release(self) -> None:
        with _LOCK:
            self._users -= 1
            if self._users == 0:
                rebind(self._instead, self.own)


def _instead_of(own: Any) -> Any:
    """A function that is `own` for all but the threads in a block."""
    signature = inspect.signature(own)

    @functools.wraps(own)
    def attention(*args: Any, **keywords: Any) -> Any:
        if not _THREAD.entered:
            return own(*args, **keywords)
        try:
            arguments = signature.bind(*args, **keywords).arguments
        except TypeError:
            return own(*args, **keywords)  # which says what is wrong
        caller = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
        where = f"{caller.f_globals.get('__name__')}:{caller.f_lineno}"
        is_taken, out = _THREAD.entered[-1][0].attend(where, arguments)
        return out if is_taken else own(*args, **keywords)

    return attention


def _in_words(x: Any) -> str:
    array: Any = x if hasattr(x, "dtype") else jnp.asarray(x)
    return f"{array.dtype}{list(array.shape)}"


_LOCK = threading.RLock()
_THREAD = _Thread()
_CONTEXT: Any = thread_context(None)
_SWITCH = _Switch()
