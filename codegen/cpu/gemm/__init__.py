"""Products with packed floats: register tiles, and the loops around them."""
