"""Who says which of two completions is better."""
