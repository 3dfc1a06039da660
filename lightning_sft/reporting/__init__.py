"""Metrics, answers and scores → pages, plots and comparisons."""
