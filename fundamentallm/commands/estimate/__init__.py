"""`fundamentallm estimate`."""
