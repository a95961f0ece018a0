"""Replay: a Reverb server in its own process, writers that stream into it, samplers that read batches."""
