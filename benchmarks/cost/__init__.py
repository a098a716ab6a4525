"""The cost model of the Triton kernels, for `benchmarks.model` and `benchmarks.tune`."""
