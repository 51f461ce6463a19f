"""What a kernel computes, whatever the target: sizes and dtypes, no layout and no lanes."""
