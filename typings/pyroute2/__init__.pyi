"""Only what agent/kernel uses of pyroute2: its message classes."""
