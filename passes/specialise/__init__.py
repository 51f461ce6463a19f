"""Passes that bind inputs, adapters or architectures, and compute what then is constant."""
