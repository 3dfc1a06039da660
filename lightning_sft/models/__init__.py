"""Decoders from scratch, their cache, adapters, and weights in and out."""
