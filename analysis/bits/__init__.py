"""`moec quantize`: choose bits and group sizes of every part of a model for an artifact of a given size."""
