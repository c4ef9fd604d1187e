"""The life of one run in its folder."""
