"""The policies, pure: blocks, prefill batching, decode admission, dispatch, finish rules. No torch, no clock."""
