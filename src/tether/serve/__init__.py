"""What other processes ask over HTTP: the reward server."""
