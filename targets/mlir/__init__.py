"""The MLIR target: the fused graph and its reference expansion as torch-mlir text, executed here. See docs/mlir.md."""
