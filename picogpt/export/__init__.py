"""What is made of a run to be given away: pages of one file without network, GPT-2, and a run without its checkpoints."""
