"""One file per training command: its options, and what it does. :mod:`tether.training.common` has what they share."""
