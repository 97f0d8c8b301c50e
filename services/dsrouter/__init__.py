"""Router: the one door. Admits, tokenises, dispatches, fans out tokens, ends every request exactly once."""
