"""`python -m quadriga`, the same as the command `quadriga`."""

from quadriga.cli import main

if __name__ == "__main__":
    main()
