"""Native code: kernels, the runtime, their build, and what Python calls of them."""
