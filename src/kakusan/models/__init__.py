"""Floor 3: networks, and what a network's output means."""
