"""The report on a compilation: data, text and pictures."""
