"""Arguments of a call made into commands of the protocol: one request, many of them, and pieces of those that are too large."""
