"""``python -m loratools``."""

from loratools.cli import main

main()
