"""What quantization costs: artifacts and checkpoints against the float model, on text that nothing was fitted to."""
