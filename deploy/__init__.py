"""Where the parts meet: command line, wiring, and the ways to run (inline, Ray)."""
