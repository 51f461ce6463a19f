"""Applies the choices of `moec optimize`, which a file has: experts, top-k and
formats of weights."""
