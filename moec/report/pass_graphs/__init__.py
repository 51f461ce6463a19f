"""Graphs after each pass as data: of a page, and of a part of an artifact."""
