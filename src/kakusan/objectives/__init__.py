"""Floor 3: what a network is trained to minimise."""
