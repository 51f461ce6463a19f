"""What commands print: names, logs and progress."""
