"""Turns public chest CT datasets into shards: ``python -m data_prep --help``."""
