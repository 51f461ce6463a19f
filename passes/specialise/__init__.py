"""What is known before the model runs is computed before it runs."""
