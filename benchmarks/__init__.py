"""Benchmarks: `python -m benchmarks.run` verifies and times, `python -m benchmarks.gpu_check` checks a GPU machine."""
