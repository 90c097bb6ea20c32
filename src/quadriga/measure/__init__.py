"""Latency, memory, size, work and quality of a model, with their uncertainty."""
