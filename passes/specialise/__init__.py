"""Passes that bind inputs, adapters or architectures, and fold the values that become constant."""
