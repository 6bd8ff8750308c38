"""Whether training in INT8 and INT4 reaches what training in float32 reaches."""
