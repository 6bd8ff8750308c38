"""Benchmarks of attention against its peers."""
