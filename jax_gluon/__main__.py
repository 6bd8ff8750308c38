"""`python -m jax_gluon`: the command `jax-gluon`."""

import sys

from jax_gluon._cli import main

sys.exit(main())
