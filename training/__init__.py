"""Training: data, tokenizer, the four stages, evaluation and reports; its checkpoints are what the compiler reads."""
