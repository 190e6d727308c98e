"""The Metal GPU target: ExecuTorch `.pte` with the MLX delegate."""
