"""Reads shards back, proves them and shows them."""
