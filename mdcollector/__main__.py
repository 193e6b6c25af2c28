"""`python -m mdcollector`: the commands."""

from mdcollector.cli import main

if __name__ == "__main__":
    main()
