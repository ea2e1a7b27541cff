"""The networks, and what is theirs alone: embeddings, attention backends, what they cost."""
