"""Kernels of decodax: one folder per operation, each with a jnp reference of the same signature."""

from pallas_kernels.dispatch import default_implementation as default_implementation

__all__ = ['default_implementation']
