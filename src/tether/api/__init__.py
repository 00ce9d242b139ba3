"""The commands as Python functions: options as keyword arguments, data and rewards as Python objects."""
