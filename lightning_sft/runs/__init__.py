"""A run's folder and the files in it. Nothing here imports torch."""
