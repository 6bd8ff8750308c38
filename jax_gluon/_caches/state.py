"""Caches as dicts of arrays, and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from jax_gluon._errors import Checker
from jax_gluon._quantization.formats import QuantizedTensor, QuantSpec, check_parts

#: What is no array: JSON in bytes, which is one.
_LAYOUT = "layout"
_PARTS = ("data", "scale", "zero_point", "minimum", "center")


def to_state(cache: Any) -> dict[str, Any]:
    """The fields of a cache that there are, and its layout."""
    arrays: dict[str, Any] = {}
    layout: dict[str, Any] = {"class": type(cache).__name__}
    for field in dataclasses.fields(cache):
        x = getattr(cache, field.name)
        if isinstance(x, QuantizedTensor):
            parts = {name: getattr(x, name) for name in _PARTS}
            arrays[field.name] = {name: part for name, part in parts.items() if part is not None}
            layout[field.name] = {
                "spec": dataclasses.asdict(x.spec), "dtype": str(x.dtype), "head_dim": x.head_dim
            }  # fmt: skip
        elif isinstance(x, QuantSpec):
            layout[field.name] = dataclasses.asdict(x)
        elif x is None or isinstance(x, int):
            layout[field.name] = x
        elif isinstance(x, np.dtype):
            layout[field.name] = str(cast(Any, x))
        else:
            arrays[field.name] = x
    text = np.frombuffer(json.dumps(layout).encode(), np.uint8)
    return {**arrays, _LAYOUT: jnp.asarray(text)}


def from_state(check: Checker, kind: type, state: Any) -> Any:
    """The cache of class `kind` that a state is of."""
    given: dict[str, Any] = dict(cast(Any, state)) if isinstance(state, Mapping) else {}
    if _LAYOUT not in given:
        found = f"of {sorted(map(str, given))}" if given else f"a {type(cast(Any, state)).__name__}"
        check.value_error("state_dict", found, f'what state_dict() returned, with "{_LAYOUT}"')
    layout = _layout_of(check, given[_LAYOUT])
    if layout.get("class") != kind.__name__:
        found = f"that of a {layout.get('class')}"
        check.value_error("state_dict", found, f"that of a {kind.__name__}")
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(cast(Any, kind)):
        known, x = layout.get(field.name), given.get(field.name)
        if field.name in ("key", "value"):
            fields[field.name] = _codes(check, field.name, known, x)
        elif field.name == "query":
            fields[field.name] = None if known is None else QuantSpec(**known)
        elif field.name == "window":
            fields[field.name] = known
        elif field.name == "dtype":
            fields[field.name] = jnp.dtype(cast(str, known))
        elif x is not None:
            fields[field.name] = jnp.asarray(x)
        elif field.name in layout:
            fields[field.name] = None
        else:
            check.value_error("state_dict", f"without {field.name}", "what state_dict() returned")
    B = fields["length"].shape
    for name in ("dropped", "longest", "key_head", "value_head", "key_tail", "value_tail"):
        x = fields[name]
        if x is not None and x.shape[:1] != B:
            found = f"with {name} of shape {list(x.shape)}"
            check.value_error("state_dict", found, f"a batch of length's, {list(B)}")
    return kind(**fields)


def _layout_of(check: Checker, x: Any) -> dict[str, Any]:
    try:
        return json.loads(np.asarray(x).astype(np.uint8).tobytes().decode())
    except (TypeError, ValueError) as error:
        found = f"with a {_LAYOUT} that can't be read ({error})"
        check.value_error("state_dict", found, "what state_dict() returned")


def _codes(check: Checker, name: str, known: Any, parts: Any) -> QuantizedTensor:
    if not isinstance(parts, Mapping) or not isinstance(known, dict):
        check.value_error("state_dict", f"without {name}", "what state_dict() returned")
    given: dict[str, Any] = dict(cast(Any, parts))
    arrays = {part: jnp.asarray(given[part]) if part in given else None for part in _PARTS}
    layout = cast(dict[str, Any], known)
    make = cast(Any, QuantizedTensor)
    codes: QuantizedTensor = make(
        **arrays,
        spec=QuantSpec(**layout["spec"]),
        dtype=jnp.dtype(layout["dtype"]),
        head_dim=layout["head_dim"],
    )
    # Centers are of entries, and codes may be of pages.
    center, shape = codes.center, arrays["data"].shape if arrays["data"] is not None else ()
    if center is not None and len(shape) == 4 and center.shape[1:] == (1, *codes.shape[2:]):
        center = jnp.zeros((shape[0], *center.shape[1:]), center.dtype)
    wrong = (
        "data is missing"
        if len(shape) != 4
        else check_parts(dataclasses.replace(codes, center=center))
    )
    if wrong is not None:
        check.value_error("state_dict", f"with {name} whose {wrong}", "what state_dict() returned")
    return codes
