"""What the host tells the kernels of who sees whom: entries, and lists for segments."""

from __future__ import annotations

from typing import Any

import numpy as np

FAR = 1 << 60


def reach_of(problem: Any) -> tuple[int, int]:
    """How many keys before and after its own position a row sees."""
    left, right = (FAR if x < 0 else x for x in problem.window or (-1, -1))
    return left, 0 if problem.is_causal else right


def entries_and_lists(problem: Any, kind: np.dtype[Any]) -> tuple[Any, Any]:
    """`BatchEntry`s of type `kind`, and the lists that they start in; None: none is needed."""
    given = (problem.query_lengths, problem.key_value_lengths, problem.query_offset)
    if all(x is None for x in (*given, problem.segment_ids)):
        return None, None
    rows, keys, position = (
        np.broadcast_to(default if x is None else np.asarray(x, np.int64), problem.B)
        for x, default in zip(given, (problem.T, problem.S, 0), strict=True)
    )
    left, right = reach_of(problem)
    entries = np.zeros(problem.B, kind)
    entries["rows"], entries["keys"] = np.clip(rows, 0, problem.T), np.clip(keys, 0, problem.S)
    entries["first"], entries["last"] = position - left, position + right
    entries["list"] = -1
    if problem.segment_ids is None:
        return entries, None
    lists: list[int] = []
    for entry, of_rows, of_keys in zip(entries, *problem.segment_ids, strict=True):
        entry["list"], entry["has_ranks"] = len(lists), True
        lists += _list(problem, entry, of_rows, of_keys)
    return entries, np.asarray(lists, np.int32)


def _list(problem: Any, entry: Any, of_rows: Any, of_keys: Any) -> list[int]:
    """Ranges of rows, of eights of rows and of eights of keys; ranges of ranks, and ranks."""
    T, S = problem.T, problem.S
    i, j = np.arange(T)[:, None], np.arange(S)
    seen = (of_rows[:, None] == of_keys) & (i < entry["rows"]) & (j < entry["keys"])
    seen &= (i + entry["first"] <= j) & (j <= i + entry["last"])
    ranks = np.argsort(np.argsort(of_keys, kind="stable"), kind="stable")
    eights = [seen[at : at + 8].any(0) for at in range(0, T, 8)]
    of_eights = [seen[:, at : at + 8].any(1) for at in range(0, S, 8)]
    # A row sees ranks that follow one another.
    of_ranks = [_range(np.isin(np.arange(S), ranks[row])) for row in seen]
    ranges = [_range(x) for x in (*seen, *eights, *of_eights)]
    return [*np.ravel([*ranges, *of_ranks]).tolist(), *ranks.tolist()]


def _range(x: Any) -> tuple[int, int]:
    """From the first to past the last that is true."""
    found = np.flatnonzero(x)
    return (int(found[0]), int(found[-1]) + 1) if found.size else (0, 0)
