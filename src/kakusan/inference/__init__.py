"""Floor 4: what a trained model is asked, and how its answers are judged."""
