"""Batch and heads over the devices of a mesh."""
