"""Metal kernels where there is no Metal: MLX's generated source, run and checked on the CPU."""
