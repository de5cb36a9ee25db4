"""`python -m powerplan` is the command `powerplan`."""

from powerplan.cli import run

if __name__ == "__main__":
    run()
