"""Optimizer methods: how a gradient becomes an update."""
