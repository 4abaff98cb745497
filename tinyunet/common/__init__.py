"""What every part uses and nobody comes for: checks, errors, files, and what is shown on a terminal."""
