"""What `moec run` does with prompts and with ranks."""
