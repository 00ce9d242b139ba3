"""Monitors: what watches a run and raises alarms (:class:`tether.types.Monitor`)."""
