"""Functions that are replaced while a module is traced. `table.py` lists them."""
