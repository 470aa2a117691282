"""What only the tables and figures of Wen et al. need."""
