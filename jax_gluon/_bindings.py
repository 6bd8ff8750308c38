"""Where a program holds a function: names of modules, which can be bound anew, and other places."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from types import CellType, FunctionType, ModuleType
from typing import Any, cast


def rebind(old: object, new: object) -> None:
    """Every name of a module that is bound to `old` is bound to `new`, but this package's own."""
    for name, names in _names_of_modules():
        if not _is_own(name):
            for each in [each for each, value in names.copy().items() if value is old]:
                names[each] = new


def other_holders(function: object) -> tuple[str, ...]:
    """What else refers to a function, in words: where `rebind` does not reach."""
    modules = {id(names) for _, names in _names_of_modules()}
    found: set[str | None] = set()
    for holder in gc.get_referrers(function):
        if id(holder) not in modules:
            found.add(_described(holder, function))
    return tuple(sorted(words for words in found if words is not None))


def _is_own(module: str) -> bool:
    return module.split(".")[0] == __name__.split(".")[0]


def _names_of_modules() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in tuple(sys.modules.items()):
        # Modules that load themselves at the first look at them are asked nothing.
        if ModuleType in type(module).__mro__:
            yield name, object.__getattribute__(module, "__dict__")


def _described(holder: object, function: object) -> str | None:
    """Of a holder that a user can find; None of others, such as frames."""
    if isinstance(holder, functools.partial):
        return "a functools.partial"
    if isinstance(holder, dict):
        return _of_dict(cast(dict[Any, object], holder), function)
    if isinstance(holder, tuple):
        for owner in gc.get_referrers(cast(object, holder)):
            if isinstance(owner, FunctionType) and owner.__defaults__ is holder:
                return f"a default argument of {_name(owner)}"
        return None
    if isinstance(holder, CellType):
        for closure in gc.get_referrers(holder):
            for owner in gc.get_referrers(closure) if isinstance(closure, tuple) else ():
                if isinstance(owner, FunctionType) and owner.__closure__ is closure:
                    is_own = _is_own(owner.__globals__["__name__"])
                    return None if is_own else f"the closure of {_name(owner)}"
        return None
    kind = type(holder)
    if kind.__module__ == "builtins":
        return f"a {kind.__name__}" if isinstance(holder, list | set | staticmethod) else None
    return None if _is_own(kind.__module__) else f"an attribute of a {_name(kind)}"


def _of_dict(values: dict[Any, object], function: object) -> str | None:
    key = next((key for key, value in values.items() if value is function), None)
    for owner in gc.get_referrers(values):
        if isinstance(owner, type) and owner.__dict__.get(str(key)) is function:
            return f"attribute {key} of class {_name(owner)}"
        if isinstance(owner, FunctionType):
            if owner.__kwdefaults__ is values:
                return f"a default argument of {_name(owner)}"
            return None  # `__wrapped__`, which nothing calls
        if getattr(owner, "__dict__", None) is values:
            return f"attribute {key} of a {_name(type(owner))}"
    return f"entry {key!r} of a dict"


def _name(x: Any) -> str:
    return f"{x.__module__}.{x.__qualname__}"
