"""Messages that the plugin sends: each selector, and the types that it is sent with.

Objective-C finds methods by name alone, and calls them as our headers say: a wrong name fails when
the message is sent, a wrong type garbles arguments. The first is read from the binary, the second
from the declarations that the host code was compiled with.
"""

from __future__ import annotations

from dataclasses import dataclass

import lief

from tools.macos import reviewed
from tools.macos.gate import encoding
from tools.macos.gate.interface import Interface, Method
from tools.macos.gate.metal_cpp import MetalCpp
from tools.macos.gate.pyobjc import PyObjC
from tools.macos.gate.result import Result


@dataclass(frozen=True)
class Oracles:
    """Who knows about Apple's interfaces."""

    pyobjc: PyObjC
    metal_cpp: MetalCpp

    def judge(self, method: Method) -> tuple[bool, list[str]]:
        """Whether all types of `method` are confirmed, and what contradicts them."""
        is_confirmed, problems = False, []
        exact = self.pyobjc.encodings.get((method.owner, method.sign, method.selector))
        if exact is not None:
            is_confirmed = True
            if encoding.types(exact) != encoding.types(method.encoding):
                problems.append(
                    f"{method} is {method.encoding}, {exact} in Apple's headers (PyObjC)"
                )
        overloads = self.metal_cpp.methods.get((method.owner, method.selector))
        if overloads is not None:
            is_confirmed = True
            ours = encoding.plain_types(method.encoding)
            if ours not in overloads:
                theirs = " or ".join(sorted("".join(each) for each in overloads))
                problems.append(f"{method} is {''.join(ours)}, {theirs} in metal-cpp")
        kinds = [encoding.plain(kind) for kind in encoding.types(method.encoding)]
        for index, kind in self.pyobjc.methods.get((method.owner, method.selector), {}).items():
            ours = kinds[0 if index == -1 else index + 1]
            if not _agrees(ours, encoding.plain(kind)):
                part = "result" if index == -1 else f"argument {index - 2}"
                problems.append(f"{method}: the {part} is {ours}, {kind} in PyObjC's metadata")
        return is_confirmed, problems


def _agrees(ours: str, theirs: str) -> bool:
    """Whether a type is that of PyObjC's metadata, which has letters of its own.

    To what a pointer points, it says as Python should see it.
    """
    if ours[0] in "^*":
        return theirs[0] in "^*["
    return ours == {"Z": "B", "z": "c", "t": "c", "T": "S"}.get(theirs, theirs)


def selectors(plugin: lief.MachO.Binary) -> set[str]:
    """Names of all messages in a binary."""
    section = plugin.get_section("__objc_methname")
    if section is None:
        return set()
    return {name.decode() for name in bytes(section.content).split(b"\0") if name}


def sent_methods(ours: Interface, sent: set[str]) -> tuple[set[Method], list[str]]:
    """Declarations of the messages in the binary, and the selectors that have none."""
    found = {method for method in ours.sent if method.selector in sent}
    # What clang sends for literals and loops is not in the host code: any declaration may be meant.
    rest = sent - {method.selector for method in found}
    implied = {method for method in ours.methods if method.selector in rest}
    unknown = sorted(rest - {method.selector for method in implied})
    return found | implied, unknown


def check_sent(plugin: lief.MachO.Binary, ours: Interface, oracles: Oracles) -> Result:
    names = selectors(plugin)
    methods, unknown = sent_methods(ours, names)
    problems = [f"{name} is sent, but nothing declares it" for name in unknown]
    unneeded, confirmed = set(reviewed.MESSAGES), 0
    for method in sorted(methods):
        is_confirmed, contradictions = oracles.judge(method)
        problems += contradictions
        confirmed += is_confirmed
        if not is_confirmed:
            unneeded.discard(str(method))
            if str(method) not in reviewed.MESSAGES:
                problems.append(
                    f"{method} {method.encoding} is known to neither PyObjC nor metal-cpp"
                )
    problems += [f"{name} is in reviewed.MESSAGES without need" for name in sorted(unneeded)]
    rest = len(methods) - confirmed
    evidence = f"{len(names)} selectors; types of {confirmed} methods confirmed, {rest} reviewed"
    return Result("messages", evidence, tuple(problems))


def check_declared(ours: Interface, oracles: Oracles) -> Result:
    """All that our headers declare, for the software device has it too."""
    problems: list[str] = []
    confirmed = 0
    for method in sorted(ours.methods):
        is_confirmed, contradictions = oracles.judge(method)
        confirmed += is_confirmed
        problems += contradictions
    evidence = f"types of {confirmed} of {len(ours.methods)} methods in our headers confirmed"
    return Result("declarations", evidence, tuple(problems))


def check_functions(imported: set[str], ours: Interface, pyobjc: PyObjC) -> Result:
    """C functions of the frameworks that the plugin imports."""
    problems, count = [], 0
    for name, declared in sorted(ours.functions.items()):
        if f"_{name}" not in imported:
            continue
        count += 1
        kinds = "".join(encoding.plain(each) for each in encoding.types(declared))
        if pyobjc.functions.get(name) != kinds:
            problems.append(f"{name} is {kinds}, {pyobjc.functions.get(name)} in PyObjC's metadata")
    return Result("functions", f"types of {count} imported ones, as in PyObjC", tuple(problems))
