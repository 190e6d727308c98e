"""The ONNX target: a `model.onnx` with its weights beside it, for ONNX Runtime and other readers of ONNX."""
