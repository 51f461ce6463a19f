"""Functions of Python on symbolic sizes, during an export."""
