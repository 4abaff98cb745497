"""Training on many processes: what they say to each other, and how they wait for it."""
