"""The transmission phase: commands and their checks, memory for what comes, the decoder, what replies do to commands."""
