"""The person: the command line and what it shows."""
