"""People label in Argilla: the embedded server."""
