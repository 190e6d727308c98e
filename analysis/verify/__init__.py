"""Does the artifact compute what the model computes? Metrics, tolerances, and the comparison itself."""
