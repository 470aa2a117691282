"""Bundles of a trained module: written, read back, and added to while it learns."""
