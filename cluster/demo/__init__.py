"""Two small real models for first steps and tests, built from what one PyPI wheel of 93 MB holds."""
