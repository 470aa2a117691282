"""Files: written whole or not at all, locked, and read as if a stranger had written them."""
