"""Prefill instance: reads prompts, makes the first token, keeps the KV until decode has fetched it."""
