"""A checkpoint: a directory that is complete or absent."""
