"""Embeddings of volumes: making, storing and reading them."""
