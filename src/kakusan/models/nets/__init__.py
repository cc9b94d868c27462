"""Plain networks (x, t, label) -> like x; they know nothing of diffusion."""
