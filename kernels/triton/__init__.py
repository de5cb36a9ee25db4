"""Power attention in Triton: gates, scan, output, backward and decode kernels, each beside its launch.

Nothing here is imported before `impl="triton"` is asked for.
"""
