"""Training schemes, and layers to train, of mixture-of-experts models."""
