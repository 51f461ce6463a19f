"""Proof by running: what replaces a region agrees with it on random inputs."""
