"""Infers the rules of an MoE layer from what it computes for chosen inputs."""
