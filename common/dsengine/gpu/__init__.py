"""Steps on a GPU: attention in place over the paged cache, and decode steps that are launched as a whole."""
