"""Text into memory-mapped corpora, corpora into batches."""
