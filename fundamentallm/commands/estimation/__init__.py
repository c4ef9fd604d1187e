"""What a run takes, worked out from its settings alone; `fundamentallm estimate` shows it."""
