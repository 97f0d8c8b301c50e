"""The rank host: runs the ranks that an instance has on a node other than its own."""
