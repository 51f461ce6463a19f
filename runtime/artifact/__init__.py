"""The artifact: a compiled model on disk, its manifest and its signature."""
