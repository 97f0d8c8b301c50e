"""The supervisor of one host's processes: decisions in ``state``, deeds in ``supervisor`` and ``child``."""
