"""Downloads datasets from the Hugging Face hub."""
