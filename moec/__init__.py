"""moec: the compiler for mixture-of-experts models."""
