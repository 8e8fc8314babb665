"""The compiler passes: they know graphs, not users."""
