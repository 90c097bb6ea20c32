"""Training methods: how a batch becomes a step."""
