"""Products with compressed weights, decoded on the way."""
