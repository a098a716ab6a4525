"""Triton kernels: launch configurations as data, forward, backward, launchers.

A file per op; of a long one <op>_<part>.py hold parts, and _<op>.py what these share.
Installed as `mlhead.kernels`. Nothing here imports the rest of mlhead.
"""
