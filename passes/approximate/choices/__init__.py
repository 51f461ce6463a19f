"""Applies the choices of `moec optimize`, which a file has: formats of weights."""
