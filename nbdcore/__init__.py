"""A Network Block Device (NBD) client and server in pure Python, over pluggable transports."""

__version__ = "0.1.0"
