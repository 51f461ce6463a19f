"""GGUF files: their weights, the configuration of their model, their tokenizer."""
