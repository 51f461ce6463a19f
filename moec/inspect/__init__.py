"""Shows a model, compares two, and times them beside other runtimes."""
