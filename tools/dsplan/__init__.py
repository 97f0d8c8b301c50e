"""The planner: latency models, memory, and the search for the placement with the most goodput per device."""
