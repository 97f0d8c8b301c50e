"""The parts of ``dsbench kv``."""
