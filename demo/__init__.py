"""The demo: a small language model trained with float and with INT8 attention."""
