"""Floor 0: shapes, operators, calculus, noise and time grids. Needs torch alone."""
