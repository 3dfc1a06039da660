"""Prompts → answers."""
