"""Copying a disk: files, block devices, pipes and NBD servers, each to each. `copy` is where to begin."""
