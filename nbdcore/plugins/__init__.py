"""Transports as plugins: what one is (`spec`), and how they are found, kept and reported (`registry`)."""
