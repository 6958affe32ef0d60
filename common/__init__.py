"""What the scripts share."""

__version__ = "1.0.0"
