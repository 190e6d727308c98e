"""Native code: kernels, the runtime, their build, and the Python that calls them."""
