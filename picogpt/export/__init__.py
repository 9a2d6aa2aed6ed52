"""Pages made of a run: one file each, without network."""
