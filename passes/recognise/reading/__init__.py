"""Reads a region of a graph as what one expert does with its rows: the body of a block."""
