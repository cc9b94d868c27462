"""`python -m kakusan` is `kakusan`."""

from kakusan.cli import main

main()
