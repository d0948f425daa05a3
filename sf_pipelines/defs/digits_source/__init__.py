"""What writes the source of the demo."""
