"""A model as nested boxes, for Graphviz."""
