"""Speed and memory, measured against rivals in one run; no part of the package or the suite."""
