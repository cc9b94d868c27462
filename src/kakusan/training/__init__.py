"""Floor 5: configuration, data, the trainer and its files."""
