"""The front end for threads: calls that wait for their outcome."""
