"""Names of jaxtyping, for annotations with dtype and axes: `Float[Array, "*B T N H"]`.

Axes are the letters of `jax_gluon._problem`; `*B` is any number of batch axes, and `#` is before
what may also be 1. As jaxtyping is to type checkers, each is `Annotated`, so that it is not needed
to import this package. `tests/package/test_annotations.py` reads them with jaxtyping.
"""

from typing import Annotated as Bool
from typing import Annotated as BoolOrInteger
from typing import Annotated as Float
from typing import Annotated as Float32
from typing import Annotated as Int8
from typing import Annotated as Int32
from typing import Annotated as Integer
from typing import Annotated as Key
from typing import Annotated as Num
from typing import Annotated as Real
from typing import Annotated as Shaped
from typing import Annotated as UInt8
from typing import Annotated as UInt16
from typing import Annotated as UInt32

from jax import Array

__all__ = [
    "Array",
    "Bool",
    "BoolOrInteger",
    "Float",
    "Float32",
    "Int8",
    "Int32",
    "Integer",
    "Key",
    "Num",
    "Real",
    "Shaped",
    "UInt8",
    "UInt16",
    "UInt32",
]
