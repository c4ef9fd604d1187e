"""The checks behind `fundamentallm doctor`, and the short runs they look at."""
