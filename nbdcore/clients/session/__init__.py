"""A session joins an engine and a stream, and what is known of the export. Nothing here waits, except in a stream's own calls."""
