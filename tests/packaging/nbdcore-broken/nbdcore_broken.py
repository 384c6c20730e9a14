"""A transport plugin whose author never tried it."""

raise RuntimeError("the flux capacitor is missing")
