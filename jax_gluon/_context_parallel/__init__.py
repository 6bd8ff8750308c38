"""Attention over tokens that several devices share: which blocks move where, and what is done."""
