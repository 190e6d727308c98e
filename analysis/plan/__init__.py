"""Planning: what a model needs on a device before it is compiled, and which shape to train for a device."""
