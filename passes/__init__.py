"""The compiler passes: they know graphs, not users. ``stream`` runs them in order.

The first line of each folder says what lives there and what it may import.
"""
