"""Speed, always as a ratio of sides that run in turn in one process tree; nothing here asserts a time."""
