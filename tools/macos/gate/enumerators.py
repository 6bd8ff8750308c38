"""Values of our headers' enumerators against PyObjC's and metal-cpp's."""

from __future__ import annotations

from tools.macos import reviewed
from tools.macos.gate.interface import Interface
from tools.macos.gate.metal_cpp import MetalCpp
from tools.macos.gate.pyobjc import PyObjC
from tools.macos.gate.result import Result

_WORD = 1 << 64  # signed or not, the bits are the same


def check(ours: Interface, pyobjc: PyObjC, metal_cpp: MetalCpp) -> Result:
    problems, unneeded, proved = [], set(reviewed.ENUMERATORS), 0
    for name, value in sorted(ours.enumerators.items()):
        known = {
            source: values[name]
            for source, values in (
                ("PyObjC", pyobjc.enumerators),
                ("metal-cpp", metal_cpp.enumerators),
            )
            if name in values
        }
        differing = {s: v for s, v in known.items() if v % _WORD != value % _WORD}
        if known and not differing:
            proved += 1
        elif name in reviewed.ENUMERATORS and reviewed.ENUMERATORS[name][0] == value:
            unneeded.discard(name)
        elif not known:
            problems.append(f"{name} = {value} is known to neither PyObjC nor metal-cpp")
        problems += [
            f"{name} is {value}, {v} in {source}"
            for source, v in differing.items()
            if reviewed.ENUMERATORS.get(name, (None,))[0] != value
        ]
    problems += [f"{name} is in reviewed.ENUMERATORS without need" for name in sorted(unneeded)]
    used = len(ours.used_enumerators & set(ours.enumerators))
    evidence = f"{proved} of {len(ours.enumerators)} in our headers confirmed; {used} are used"
    return Result("enumerators", evidence, tuple(problems))
