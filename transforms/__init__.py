"""The steps: each module is one Beam transform family, and steps never import each other."""
