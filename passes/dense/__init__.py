"""Passes for the dense part of a transformer: attention, masks, norms, rotary embedding."""
