"""Transforms from CT volumes to what encoders see, and from masks to soft labels."""
