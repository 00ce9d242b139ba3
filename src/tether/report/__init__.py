"""What a run looks like to a person: tables on the terminal, plots, and one self-contained HTML page."""
