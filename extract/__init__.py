"""Stage 1: frozen encoders run once over a dataset's media and fill a feature set."""
