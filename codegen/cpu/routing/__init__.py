"""Kernels of routers, of the sort of rows by expert, and of the weighted sum per token."""
