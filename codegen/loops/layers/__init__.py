"""Ops of moec in plain loops: rotary embeddings, and MoE without a kernel."""
