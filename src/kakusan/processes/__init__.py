"""Floor 1: stochastic differential equations, and the transformations between them."""
