"""The graph: data, its text, its sizes, and how its ops are called."""
