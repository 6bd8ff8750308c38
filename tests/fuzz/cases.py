"""A random problem: what it is made of, drawn from one number, and as text that makes it again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from jax_gluon._quantization.formats import GRANULARITIES, QuantSpec

DTYPES = ("float32", "bfloat16", "float16")
KINDS = ("normal", "outliers", "tiny", "integers", "constant", "peaked", "large")
#: Of floats alone: of large logits codes that are rounded again leave errors of their size.
_PEAKED = 2


@dataclass(frozen=True)
class Case:
    """What is drawn. Arrays follow from `seed`; rules are names of what hides or changes logits."""

    seed: int
    B: int
    T: int
    S: int
    K: int
    group: int
    H: int
    V: int
    dtype: str = "float32"
    kind: str = "normal"
    rules: tuple[str, ...] = ()
    #: Of query, key and value: fields of a `QuantSpec`; None: floats.
    specs: tuple[dict[str, Any] | None, ...] = (None, None, None)
    #: How the call is made: implementation, variant, kernel, layout, differentiation.
    how: dict[str, Any] = field(default_factory=dict)

    @property
    def N(self) -> int:
        return self.K * self.group

    def quant_specs(self) -> list[QuantSpec | None]:
        return [None if spec is None else QuantSpec(**spec) for spec in self.specs]

    def __str__(self) -> str:
        default = {x.name: x.default for x in fields(Case)}
        given = {name: x for name, x in asdict(self).items() if x != default[name]}
        return json.dumps(given, separators=(",", ":"))

    @staticmethod
    def of(text: str) -> Case:
        given = json.loads(text)
        for name in ("rules", "specs"):
            if name in given:
                given[name] = tuple(given[name])
        return Case(**given)


RULES = (
    "causal", "window", "query_lengths", "key_value_lengths", "offset", "segments", "positions",
    "mask", "mask_of_keys", "mask_of_rows", "key_value_mask", "bias", "bias_of_keys",
    "bias_of_rows", "bias_infinite", "soft_cap", "negative_scale", "sinks", "dropout",
    "hidden_nan",
)  # fmt: skip
#: Of which a call takes one.
_RIVALS = (
    ("offset", "positions"), ("mask", "mask_of_keys", "mask_of_rows"),
    ("bias", "bias_of_keys", "bias_of_rows", "bias_infinite"), ("bias_infinite", "soft_cap"),
)  # fmt: skip


def draw(seed: int, variants: list[str], implementations: list[str]) -> Case:
    """The case of a number."""
    rng = np.random.default_rng(seed)

    def pick(values: Any, p: Any = None) -> Any:
        return values[int(rng.choice(len(values), p=p))]

    def extent(most: int) -> int:
        # Around the sizes of tiles, subtiles and blocks, and anything else.
        near = pick((1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)) + int(rng.integers(-1, 2))
        anything = int(rng.integers(1, most + 1))
        return min(most, max(1, pick((near, anything))))

    has_codes = rng.random() < 0.4
    specs = tuple(_spec(rng) if has_codes and rng.random() < 0.7 else None for _ in range(3))
    count = int(rng.choice((0, 1, 2, 3, 5), p=(0.15, 0.3, 0.25, 0.2, 0.1)))
    rules = set(rng.choice(RULES, count, replace=False).tolist())
    for rivals in _RIVALS:
        for other in [rule for rule in rivals if rule in rules][1:]:
            rules.discard(other)
    case = Case(
        seed=seed,
        B=int(rng.integers(1, 4)),
        T=extent(300) if rng.random() < 0.8 else int(rng.integers(1, 6)),
        S=extent(300),
        K=int(rng.integers(1, 4)),
        group=int(rng.integers(1, 5)),
        H=extent(140),
        V=0,
        dtype=pick(DTYPES, (0.5, 0.35, 0.15)),
        kind=pick(KINDS[:-_PEAKED] if any(specs) else (*KINDS, "normal", "normal")),
        rules=tuple(sorted(rules)),
        specs=specs,
    )
    implementation = pick(implementations)
    how = {"implementation": implementation}
    if implementation == "cpu":
        how |= {"isa": pick(variants), "kernel": pick((None, "baseline", "gluon"))}
    # Codes are in one layout.
    how |= {
        "layout": "BTNH" if any(specs) else pick(("BTNH", "BNTH")),
        "differentiation": pick((None, None, "any")),
    }
    V = case.H if rng.random() < 0.7 else extent(140)
    H = case.H
    if any(spec is not None and spec["bits"] == 4 for spec in specs):
        H, V = H + H % 2, V + V % 2  # two codes in a byte
    # The oracle keeps all scores, some of them for each of H.
    while case.B * case.N * case.T * case.S > 600_000:
        case = replace(case, T=max(1, case.T // 2), S=max(1, case.S * 2 // 3))
    return replace(case, H=H, V=V, how=how)


def _spec(rng: np.random.Generator) -> dict[str, Any]:
    spec: dict[str, Any] = {"bits": int(rng.choice((4, 8)))}
    spec["granularity"] = str(rng.choice(GRANULARITIES))
    spec["block_size"] = int(rng.choice((1, 5, 16, 24, 32, 64)))
    if rng.random() < 0.4:
        spec["symmetric"] = False
        spec["float_minimum"] = bool(rng.random() < 0.5)
    spec["center"] = bool(rng.random() < 0.3)
    spec["rotate"] = bool(rng.random() < 0.15)
    if spec["center"] and spec["granularity"] == "channel_block":
        spec["token_powers"] = bool(rng.random() < 0.5)
    return spec


def simpler(case: Case) -> list[Case]:
    """Cases with less in them, of which a failure may be seen more easily."""
    found = [replace(case, rules=tuple(x for x in case.rules if x != rule)) for rule in case.rules]
    found += [
        replace(case, specs=tuple(None if i == at else x for i, x in enumerate(case.specs)))
        for at, spec in enumerate(case.specs)
        if spec is not None
    ]
    for name in ("B", "T", "S", "K", "group", "H", "V"):
        if (size := getattr(case, name)) > 1:
            found += [replace(case, **{name: size // 2}), replace(case, **{name: size - 1})]
    if case.kind != "normal":
        found.append(replace(case, kind="normal"))
    if case.how.get("layout") == "BNTH":
        found.append(replace(case, how=case.how | {"layout": "BTNH"}))
    return found
