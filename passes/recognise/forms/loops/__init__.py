"""Loops over experts that select the rows of each, unrolled in the graph."""
