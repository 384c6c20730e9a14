"""The handshake: what a client asks for, the options and their replies, the conversations, and the one that is under way."""
