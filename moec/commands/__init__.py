"""The commands, one a file. Each imports what is heavy only when it runs."""
