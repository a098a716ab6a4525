"""Triton kernels, one file per op: launch configurations as data, forward, backward, launchers.

Installed as `mlhead.kernels`. Nothing here imports the rest of mlhead.
"""
