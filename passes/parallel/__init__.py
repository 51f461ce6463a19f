"""Builds a graph for each rank of a plan, with the exchange of rows between ranks."""
