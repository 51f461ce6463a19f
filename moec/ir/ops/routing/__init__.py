"""Ops of routers: scores, choices and weights of experts."""
