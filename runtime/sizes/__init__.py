"""Sizes in compiled models, without sympy."""
