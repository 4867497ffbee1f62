"""Kernels of decodax: one folder per operation, each with a jnp reference of the same signature."""
