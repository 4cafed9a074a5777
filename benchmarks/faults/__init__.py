"""What goes wrong, made to go wrong: each fault a script, each with the figure it reaches.

    python -m benchmarks.faults --folder /tmp/faults            # all, as docs/RELIABILITY.md tells
    python -m benchmarks.faults kills disks --folder /tmp/faults --times 5

Small networks with seeded weights stand for the model: what is tried here does not depend on it.
"""
