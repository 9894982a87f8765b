"""Inferers."""
