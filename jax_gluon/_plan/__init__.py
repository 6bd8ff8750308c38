"""Which kernel runs a call, and why."""
