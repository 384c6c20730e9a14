"""Streams: the one interface that the protocol core's sessions stand on, and what implements it."""
