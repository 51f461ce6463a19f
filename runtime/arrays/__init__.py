"""Arrays in files, and their comparison."""
