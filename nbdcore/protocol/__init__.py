"""The NBD protocol: bytes in, bytes out. No sockets, threads, clocks, asyncio or logging set-up in here."""
