"""`PagedKVCache`: pages of codes that the entries of a batch take as they grow, and may share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_gluon._arguments import CheckedArguments
from jax_gluon._caches.arguments import of_entry, row_within, size_of, specs_of
from jax_gluon._caches.cache import KVCache, attend
from jax_gluon._caches.pages import Grant, InPages, Pool, grant, used_pages, with_copies
from jax_gluon._caches.storage import (
    Cached,
    Tokens,
    empty,
    first_written,
    replayed,
    stored,
)
from jax_gluon._pages import gathered
from jax_gluon._quantization.formats import (
    AttentionQuantization,
    Preset,
    QuantizedTensor,
    QuantSpec,
)
from jax_gluon._typing import Array, Float, Float32, Int32, Integer

_ARRAYS = (
    "key", "value", "key_head", "value_head", "key_tail", "value_tail", "table", "length",
    "dropped", "longest",
)  # fmt: skip
_MIN_PAGE, _MAX_PAGE = 16, 256


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=_ARRAYS,
    meta_fields=("query", "window", "dtype"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PagedKVCache(KVCache):
    """Codes of keys and values on pages that the entries of a batch share, made by `create`.

    An entry takes a page when its tokens need one, and gives it back with `reset`, so that memory
    is for the tokens that there are, not for the longest sequence that each entry might have.
    `fork` and `select` share pages; a page that several have is copied when one of them writes to
    it. All of that happens in the program: no shape depends on it, and it works under `jit`, `scan`
    and donation. Keys and values have the bits that they have in a `QuantizedKVCache`, and so has
    attention, whose kernels read pages where they are (on the CPU; XLA gathers them).

    A pytree; no gradient flows through it.

    - `key`, `value`: `QuantizedTensor`s `[pages, page_size, K, H]` and `[pages, page_size, K, V]`,
      whose centers, where the format has one, are those of the entries: `[B, 1, K, H]`.
    - `key_head`, `value_head`, `key_tail`, `value_tail`, `length`, `dropped`, `longest`, `query`,
      `window`, `dtype`: as of `QuantizedKVCache`, but that a window only hides keys: there is no
      ring.
    - `table`: int32 `[B, P]`: token j of entry b is on page `table[b, j // page_size]`. Numbers of
      pages that no token has reached mean nothing.

    >>> import jax, jax_gluon
    >>> cache = jax_gluon.PagedKVCache.create(3, 16, 4, 64, page_size=32, capacity=256)
    >>> key, value = jax.random.normal(jax.random.key(0), (2, 3, 40, 4, 64))
    >>> cache = cache.append(key, value, [40, 0, 7])
    >>> cache = cache.fork(0, 1)  # shares both pages of entry 0
    >>> cache.length.tolist(), int(cache.free_pages)
    ([40, 40, 7], 13)
    >>> cache = cache.append(key[:, :1], value[:, :1])  # entries 0 and 1 get a second page each
    >>> int(cache.free_pages), int(cache.reset([0, 1]).free_pages)
    (12, 15)
    """

    key: Float[QuantizedTensor, "pages page_size K H"]
    value: Float[QuantizedTensor, "pages page_size K V"]
    key_head: Float32[Array, "B head K H"] | None
    value_head: Float32[Array, "B head K V"] | None
    key_tail: Float32[Array, "B key_tail K H"] | None
    value_tail: Float32[Array, "B value_tail K V"] | None
    table: Int32[Array, "B P"]
    length: Int32[Array, " B"]
    dropped: Int32[Array, " B"]
    longest: Int32[Array, " B"]
    query: QuantSpec | None
    window: int | None
    dtype: np.dtype[Any]

    @staticmethod
    def create(
        batch: int,
        pages: int,
        kv_heads: int,
        head_dim: int,
        *,
        page_size: int = 64,
        capacity: int | None = None,
        value_dim: int | None = None,
        quantization: Preset | AttentionQuantization = "int8",
        dtype: DTypeLike = jnp.float32,
        window: int | None = None,
    ) -> PagedKVCache:
        """An empty cache.

        **Arguments:**

        - `batch`, `kv_heads`, `head_dim`: B, K, H.
        - `pages`: how many there are, for all entries.
        - `page_size`: tokens of a page: 16, 32, 64, 128 or 256, and whole blocks of tokens of both
          formats. Shorter pages waste less behind the last token of each entry; longer ones are
          read faster.
        - `capacity`: tokens that an entry may have, a multiple of `page_size`; default: all pages.
        - `value_dim`, `quantization`, `dtype`: as of `QuantizedKVCache.create`.
        - `window`: keys that a query sees, its own included; None is all.

        **Raises:** `ValueError` or `TypeError` that names the argument, what was found and what is
        allowed.

        >>> import jax_gluon
        >>> cache = jax_gluon.PagedKVCache.create(8, 100, 4, 64, page_size=128, quantization="int4")
        >>> cache.capacity, cache.key.shape, cache.table.shape
        (12800, (100, 128, 4, 64), (8, 100))
        """
        check = PagedKVCache._check("create")
        batch, kv_heads = size_of(check, "batch", batch), size_of(check, "kv_heads", kv_heads)
        pages, head_dim = size_of(check, "pages", pages), size_of(check, "head_dim", head_dim)
        value_dim = head_dim if value_dim is None else size_of(check, "value_dim", value_dim)
        window = None if window is None else size_of(check, "window", window)
        query_spec, key_spec, value_spec = specs_of(check, quantization, head_dim, value_dim)
        page_size = size_of(check, "page_size", page_size)
        sizes = [2**i for i in range(_MIN_PAGE.bit_length() - 1, _MAX_PAGE.bit_length())]
        blocks = key_spec.token_block, value_spec.token_block
        allowed = [size for size in sizes if not any(size % block for block in blocks)]
        if not allowed:
            found = f"in blocks of {blocks[0]} tokens of keys and {blocks[1]} of values"
            check.value_error("quantization", found, "blocks that divide 256")
        if page_size not in allowed:
            check.value_error("page_size", f"{page_size}", ", ".join(map(str, allowed)))
        capacity = pages * page_size if capacity is None else size_of(check, "capacity", capacity)
        if capacity % page_size:
            check.value_error("capacity", f"{capacity}", f"a multiple of page_size, {page_size}")
        stands_for = check.float_dtype("dtype", dtype)
        rows = pages, page_size, kv_heads
        key = empty(key_spec, batch, (*rows, head_dim), stands_for)
        value = empty(value_spec, batch, (*rows, value_dim), stands_for)
        table = jnp.zeros((batch, capacity // page_size), jnp.int32)
        # Two arrays of zeros: one can't be donated twice.
        length, dropped, longest = (jnp.zeros((batch,), jnp.int32) for _ in range(3))
        return PagedKVCache(
            key.codes, value.codes, key.head, value.head, key.tail, value.tail,
            table, length, dropped, longest, query_spec, window, stands_for,
        )  # fmt: skip

    @property
    def capacity(self) -> int:
        """Tokens that an entry of the batch may have, if there are pages."""
        return self.table.shape[-1] * self.page_size

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.key.shape[-3]

    @property
    def free_pages(self) -> Int32[Array, ""]:
        """How many pages no entry has."""
        used = used_pages(self.table, self.length, self._pool)
        return self._pool.pages - jnp.sum(used, dtype=jnp.int32)

    def fork(self, source: Integer[ArrayLike, ""], target: Integer[ArrayLike, ""]) -> PagedKVCache:
        """The cache with the tokens of entry `source` in entry `target` too, which forgets its own.

        They share pages: of a prefix that many sequences begin with there is one copy, whatever
        each appends. Entry `source` may be reset; the pages stay while anyone has them.

        **Raises:** `ValueError` or `TypeError` that names the argument, what was found and what is
        allowed. A traced `target` of no entry is ignored, a traced `source` clamped.

        >>> import jax.numpy as jnp, jax_gluon
        >>> cache = jax_gluon.PagedKVCache.create(2, 4, 1, 8, page_size=16)
        >>> cache = cache.append(jnp.ones((2, 20, 1, 8)), jnp.ones((2, 20, 1, 8)), [20, 3])
        >>> forked = cache.fork(0, 1)
        >>> int(cache.free_pages), int(forked.free_pages), forked.length.tolist()
        (1, 2, [20, 20])
        """
        check, B = self._check("fork"), self.length.shape[0]
        numbers: list[jax.Array] = []
        for name, x in (("source", source), ("target", target)):
            number = check.int32(name, x)
            if number.shape != ():
                check.value_error(name, f"of shape {list(number.shape)}", "one entry of the batch")
            row_within(check, name, number, B)
            numbers.append(number)
        source_entry, target_entry = numbers[0], of_entry(numbers[1], B)
        rows = jnp.arange(B, dtype=jnp.int32).at[target_entry].set(source_entry, mode="drop")
        return self._of_rows(rows)

    @property
    def _pool(self) -> Pool:
        heads = [0 if x is None else x.shape[-3] for x in (self.key_head, self.value_head)]
        first_pages = max(1, -(-max(heads) // self.page_size))
        return Pool(self.page_size, self.key.shape[-4], first_pages)

    def _axes(self) -> tuple[Any, str, str]:
        # Pages are of all entries, so no device has a part of these.
        letters: Any = dict.fromkeys(_ARRAYS, "..n.")
        letters |= {"table": ".."} | dict.fromkeys(("length", "dropped", "longest"), ".")
        return dataclasses.replace(self, **letters), "..n.", "."

    def _of_rows(self, rows: jax.Array) -> PagedKVCache:
        def of_entries(x: Any) -> Any:
            return None if x is None else jnp.take(x, rows, axis=0, mode="clip")

        key, value = (
            dataclasses.replace(x, center=of_entries(x.center)) for x in (self.key, self.value)
        )
        others = {name: of_entries(getattr(self, name)) for name in _ARRAYS[2:]}
        return dataclasses.replace(self, key=key, value=value, **others)

    def _granted(self, begin: jax.Array, end: jax.Array, length: jax.Array) -> Grant:
        return grant(self.table, length, (begin, end), self._pool)

    def _stored(self, given: Grant, tokens: tuple[Tokens | None, Tokens | None]) -> list[Cached]:
        """Both operands with those tokens, on the pages that were given for them."""
        place, parts = InPages(given.table), list(self._cached())
        for i, (each, new) in enumerate(zip(parts, tokens, strict=True)):
            each = each._replace(codes=with_copies(each.codes, given))
            parts[i] = each if new is None else stored(place, each, new)
        return parts

    def _appended(self, key: jax.Array, value: jax.Array, count: jax.Array) -> PagedKVCache:
        length = self.length
        fits = jnp.minimum(count, self.capacity - length)
        begin = functools.reduce(
            jnp.minimum, (first_written(each, length) for each in self._cached())
        )
        begin = jnp.where(fits > 0, begin, length)
        given = self._granted(begin, length + fits, length)
        fits = jnp.clip(given.room - length, 0, fits)
        parts = self._stored(given, (Tokens(key, length, fits), Tokens(value, length, fits)))
        return self._with(
            *parts,
            table=given.table,
            length=length + fits,
            dropped=self.dropped + (count - fits),
            longest=jnp.maximum(self.longest, length + fits),
        )

    def _rewound(self, tokens: jax.Array) -> PagedKVCache:
        dropped = jnp.maximum(self.dropped - tokens, 0)
        length = jnp.maximum(self.length - jnp.maximum(tokens - self.dropped, 0), 0)
        again = [replayed(each, length) for each in self._cached()]
        # An entry that nothing was taken from stays what it is.
        is_shorter = length < self.length
        begin = length
        for each in again:
            if each is not None:
                begin = jnp.where(is_shorter, jnp.minimum(begin, each.length), begin)
        given = self._granted(begin, length, length)
        # Where no page is left to write to, codes stay those of the longer blocks.
        is_written = is_shorter & (given.room >= length)
        key, value = (
            each and each._replace(real=jnp.where(is_written, each.real, 0)) for each in again
        )
        parts = self._stored(given, (key, value))
        return self._with(*parts, table=given.table, length=length, dropped=dropped)

    def _in_one_piece(self) -> tuple[QuantizedTensor, QuantizedTensor]:
        def gather() -> tuple[QuantizedTensor, QuantizedTensor]:
            return gathered(self.key, self.table), gathered(self.value, self.table)

        return jax.eval_shape(gather)

    def _attend(self, arguments: CheckedArguments, T: int) -> jax.Array:
        problem = arguments.problem
        if problem.implementation == "metal":
            allowed = 'None, "cpu", "xla": Metal has no kernels for keys and values in pages'
            arguments.check.value_error("implementation", '"metal"', allowed)
        key, value, table = self.key, self.value, self.table
        if arguments.differentiation == "any":  # its formulas know of no pages
            key, value = (gathered(x, table) for x in (key, value))
            table = None
        operands = arguments.operands._replace(key=key, value=value, page_table=table)
        if self.window is not None:
            problem = dataclasses.replace(problem, local_window=(self.window - 1, 0))
        arguments = dataclasses.replace(arguments, operands=operands, problem=problem)
        return attend(arguments, self.length + self.dropped - T, self.length)[0]
