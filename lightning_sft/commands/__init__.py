"""A command line → one of the other folders."""
