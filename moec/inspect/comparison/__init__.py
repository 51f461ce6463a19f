"""Two artifacts beside each other: what they hold, compute, route and take."""
