"""Benchmarks of reading and writing text, compared with other runtimes and the machine's limits."""
