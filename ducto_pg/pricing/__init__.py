"""Price lists: a checked config, its rows and formulas, and the offline engine."""
