"""Import paths kept for compatibility."""
