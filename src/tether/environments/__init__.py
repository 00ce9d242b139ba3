"""What a policy acts in that comes with tether, the data for it, and what ``--env`` stands for."""
