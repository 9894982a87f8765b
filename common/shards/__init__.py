"""WebDataset shards of CT slices, and the slabs drawn from them."""
