"""Ops of sizes: read from data, bound by a pass, required to agree."""
