"""Searches formats and experts within a limit, and measures what that costs."""
