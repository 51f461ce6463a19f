"""Products of packed floats: tiles in registers, and loops around them."""
