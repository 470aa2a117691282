"""Experiments and tuned methods, as package data."""
