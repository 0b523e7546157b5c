"""Layouts of others that a model's weights may be written in."""
