"""Two small real models for first steps and tests, built from what one PyPI wheel of 93 MB holds."""

DENSE, SPARSE = "smollm2-135m", "smollm2-8x135m"
DEMO_MODELS = (DENSE, SPARSE)
