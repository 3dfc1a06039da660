"""Files of instruction data → entries → token rows → the seeded order → batches."""
