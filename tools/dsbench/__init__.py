"""Measurements of the system and of its peers, side by side in one run."""
