"""Ops of experts: rows sorted by expert, their products, their combination."""
