"""Reports in words: their tables and labels, the model that writes them from embeddings, and its training."""
