"""Graph[MOE] -> Graph[GROUPED]: bodies over all rows, and what kernels fuse."""
