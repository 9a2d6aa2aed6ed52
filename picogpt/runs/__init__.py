"""Runs on disk: the folder, finding a run by name, importing the original project's log. Import the modules by name."""
