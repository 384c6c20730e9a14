"""Block status replies made into extents: walked, clipped and merged, as objects or in columns."""
