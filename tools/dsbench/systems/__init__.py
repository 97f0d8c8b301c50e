"""What can be measured: one module a system, each loaded only in a process of its own.

Only the standard library and the system itself are imported here, so that a peer may live in another environment.
"""
