"""`python -m firstwords`."""

from firstwords.app.cli import entry

if __name__ == "__main__":
    entry()
