"""Runs whose numbers the documentation quotes. Each is one command; none is installed with the package."""
