"""Bits and group sizes of every part of a model, chosen so that an artifact has a size: `moec quantize`."""
