"""What is known of an MoE layer: its parts, its rules, and how it is called."""
