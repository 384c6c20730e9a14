"""The front end for event loops of asyncio: calls that are coroutines."""
