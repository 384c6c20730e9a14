"""From what the caller named to an open session: options, TLS, the target, attempts, and the connect calls themselves."""
