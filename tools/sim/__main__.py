"""`python -m tools.sim` is the command `mdsim`."""

from tools.sim.cli import main

if __name__ == "__main__":
    main()
