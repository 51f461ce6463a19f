"""Devices: libraries and memory on CPUs and GPUs."""
