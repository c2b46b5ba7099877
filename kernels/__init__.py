"""Triton kernels, installed as ``coachhook_fast.kernels``. Only ``coachhook_fast.ops`` imports them.

Nothing is imported here: a machine without Triton must be able to import the package.
"""
