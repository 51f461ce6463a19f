"""A page to look inside a model or an artifact: graphs, blocks, kernels, weights and routing."""
