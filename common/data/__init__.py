"""Shards, slabs and embeddings: how data is stored and sampled."""
