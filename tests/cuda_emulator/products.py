"""Dtypes by the names of kernels, and their roundings."""

from __future__ import annotations

import torch

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""The greatest relative error of one rounding, or more."""
