"""Language models and text generation."""
