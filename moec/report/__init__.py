"""What a compilation did, in numbers and words and pictures."""
