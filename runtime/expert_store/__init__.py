"""Runs models larger than memory: experts are read from the artifact into slots when needed."""
