"""`python -m moepress` is the command `moepress`."""

from moepress.cli import main

if __name__ == "__main__":
    main()
