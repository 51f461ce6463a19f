"""The pass protocol and runner, and what passes share: rewriting, options, one MoE layer."""
