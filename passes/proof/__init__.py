"""Proof by running: a region and its replacement must agree on random inputs."""
