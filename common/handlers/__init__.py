"""Ignite handlers: checkpoints, tracking, progress and output."""
