"""From files and data sets to token ids, through one tokenisation path."""
