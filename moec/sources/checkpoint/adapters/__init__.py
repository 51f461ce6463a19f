"""Adapters of PEFT, merged into the weights of a model when it is loaded."""
