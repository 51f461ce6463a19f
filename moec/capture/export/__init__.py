"""Exports a module with torch.export."""
