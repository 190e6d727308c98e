"""Grids of small models under equal active parameters and tokens, and what they say of each factor of the shape."""
