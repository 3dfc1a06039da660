"""What every folder builds on: failures, files, downloads, configs. Nothing here imports torch."""
