"""Chooses degrees, exchange and placement of every layer."""
