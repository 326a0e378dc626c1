"""The RPCs as values, and the managers that run them."""
