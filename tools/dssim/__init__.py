"""Discrete-event simulator: the services' own state machines under a virtual clock, with modelled work."""
