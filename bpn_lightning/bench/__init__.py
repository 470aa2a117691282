"""The command ``bpn-bench``: grids of runs, and the tables and pictures made of them."""
