"""The XLA implementation of everything."""
