"""The commands, one per file. Each imports heavy modules only when it runs."""
