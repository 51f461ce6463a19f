"""Files that users name: what is wrong with them, in words that a terminal can show."""
