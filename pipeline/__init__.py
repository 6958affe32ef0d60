"""The smallest and the fastest network within a budget of accuracy."""

GOALS = ("size", "speed", "both")
