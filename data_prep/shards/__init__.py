"""Writes a cohort into shards: plan, parts, whole shards, tables."""
