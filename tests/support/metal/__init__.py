"""The kernels of `shaders/`, called from NumPy on the software Metal device."""
