"""What models are made of: embeddings, output heads, losses, init functions, state dicts."""
