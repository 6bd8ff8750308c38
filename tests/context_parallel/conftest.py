"""Tests of tokens over eight devices.

`tests/package/test_several_devices.py` runs them in processes of their own; in any other they are
not collected.
"""

from tests.support import devices

DEVICES = devices.DEVICES["context_parallel"]

collect_ignore_glob = devices.left_out(__file__)
