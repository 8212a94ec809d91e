"""eP-ALM as a two-stage feature-cache pipeline: extract features once, then train on them."""

__version__ = "0.1.0"
