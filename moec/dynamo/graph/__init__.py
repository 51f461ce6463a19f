"""Dynamo's graph: traced to ATen, converted, and cut into the regions of blocks."""
