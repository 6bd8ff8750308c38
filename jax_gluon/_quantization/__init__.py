"""Codes: what they look like, and how arrays become them."""
