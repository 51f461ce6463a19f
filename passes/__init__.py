"""Graph -> Graph: one pass a file, named by what it does."""
