"""What every part uses and nobody comes for: checks, errors, files, and text for a terminal."""
