"""How fast a model reads and writes text, beside others and beside what the machine can do."""
