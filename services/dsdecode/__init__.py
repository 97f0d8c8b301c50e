"""Decode instance: fetches the KV of a prompt and makes the rest of the tokens, one a step."""
