"""Where rewards come from: rules, Python functions and learned models, and how several become one."""
