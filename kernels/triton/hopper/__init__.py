"""Kernels for Hopper (compute capability 9.0), in Gluon, which is part of triton. Legend: ../prologue.py."""
