"""A checkpoint → the files of other programs, proven to be the same model."""
