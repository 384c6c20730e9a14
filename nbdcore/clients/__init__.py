"""Clients: an engine and a stream joined in a session, and the front ends that wait for it."""
