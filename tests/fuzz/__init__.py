"""Attention of arguments that nobody chose, against the float64 oracle."""
