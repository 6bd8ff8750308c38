"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """A check is passed where it has no problems; `evidence` says what was compared with what."""

    name: str
    evidence: str
    problems: tuple[str, ...] = ()


def table(results: list[Result]) -> str:
    """One line for a check, and its problems under it."""
    lines = []
    for result in results:
        lines.append(
            f"{'FAILED' if result.problems else 'ok':6s}  {result.name:16s}  {result.evidence}"
        )
        lines += [f"        - {problem}" for problem in result.problems]
    return "\n".join(lines)
