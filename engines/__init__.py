"""Real engines on one machine: what the tests start, and what shows how a cluster is set up."""
