"""Codes: the formats, and what is done to them."""
