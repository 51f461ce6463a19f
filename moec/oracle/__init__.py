"""The judge of programs: inputs in which every input varies, and what counts as equal."""
