"""The Prefect flows, the recipe they follow, and the command line."""
