"""FinCoach: a research-to-production kit for financial coaching."""

__version__ = "0.1.0"
