"""Caches of keys and values in codes, to which tokens are appended."""
