"""Floor 2: one loop, and the methods that step through it."""
