"""How a module is called: its arguments as tensors, its constants and its states."""
