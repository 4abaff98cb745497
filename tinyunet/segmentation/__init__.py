"""A checkpoint, applied to volumes of any size; and how well it did."""
