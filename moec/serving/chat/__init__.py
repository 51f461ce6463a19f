"""A chat with a model: its messages, its commands, its terminal."""
