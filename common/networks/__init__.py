"""Encoders, heads, poolers and probes."""
