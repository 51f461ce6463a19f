"""Which experts a row belongs to, and with which weights, as a region computes it."""
