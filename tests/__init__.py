"""Tests by room: of the CPU's kernels, the FFI, Metal, the package, and what they share."""
