"""An export becomes a Graph in stage ATEN."""
