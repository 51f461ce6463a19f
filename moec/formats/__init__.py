"""How weights of few bits are stored, and which numbers they stand for."""
