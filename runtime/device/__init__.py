"""Devices: libraries, memory and repeated calls on CPUs and GPUs."""
