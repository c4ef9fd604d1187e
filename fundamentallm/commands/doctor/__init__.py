"""`fundamentallm doctor`."""
