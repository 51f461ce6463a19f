"""The linear attention of transformers, as one op that is valid at all lengths."""
