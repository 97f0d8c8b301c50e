"""The KV handle and its memory: layout, life cycle, lease, shared segment. No torch."""
