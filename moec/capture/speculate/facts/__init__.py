"""What is known of the values of tensors while a module is traced."""
