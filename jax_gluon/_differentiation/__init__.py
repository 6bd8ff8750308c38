"""Derivatives of attention: reverse mode alone, or of every mode and order."""
