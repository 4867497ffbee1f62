"""Flax targets, their loaders and their adapters to decodax."""
