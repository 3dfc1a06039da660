"""Answers → scores: another model rates them, and how far its ratings can be believed."""
