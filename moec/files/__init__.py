"""Checks of files that users name, with errors that are safe to print on a terminal."""
