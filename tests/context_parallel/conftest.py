"""Tests that need eight devices, which JAX makes of the CPU where it is told so before it starts.

`tests/package/test_several_devices.py` runs them in processes of their own; in any other they are
not collected.
"""

import jax

DEVICES = 8

collect_ignore_glob = [] if jax.device_count() >= DEVICES else ["test_*.py"]
