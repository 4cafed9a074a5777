"""Bytes in places: local paths, gs:// and s3:// behind one set of functions."""
