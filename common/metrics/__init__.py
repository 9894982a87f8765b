"""Measures of encoders and probes."""
