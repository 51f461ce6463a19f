"""What a pass is, and what passes share: rewriting, options, one MoE layer."""
