"""The commands: parsers, progress, printing and the one place where errors become lines. `main(argv) -> int` each."""
