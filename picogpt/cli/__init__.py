"""The commands, each with `main(argv) -> int`: parsers, progress, printing, and the error boundary."""
