"""A plan and recorded routing as text and pictures."""
