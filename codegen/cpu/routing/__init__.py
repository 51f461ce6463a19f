"""Choosing experts, sorting rows by expert, bringing rows back."""
