"""The Metal language: one small kernel with a known answer per feature."""
