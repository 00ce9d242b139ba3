"""``python -m tether``: the command line."""

from tether.cli import run

if __name__ == "__main__":
    run()
