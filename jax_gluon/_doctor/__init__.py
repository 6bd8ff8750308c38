"""What `jax-gluon doctor` finds out of this machine: facts, a test of the kernels, and plans."""
