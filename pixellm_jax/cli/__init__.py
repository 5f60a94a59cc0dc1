"""The sub-commands of `pixellm`: parse, call, print."""
