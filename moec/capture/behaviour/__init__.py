"""What a module does as a mixture of experts, found by watching it run, and proved."""
