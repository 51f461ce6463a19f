"""softmax(q @ k.T * scale + mask) @ v: by tiles on tensor cores, and by warps."""
