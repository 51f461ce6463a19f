"""Sizes: expressions over named sizes, their exact values, and where these change."""
