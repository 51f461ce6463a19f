"""Operators on tensors whose sizes or values are symbolic, while a module is traced."""
