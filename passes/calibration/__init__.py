"""Calibration data, the loss of quality that is measured on them, and GPTQ."""
