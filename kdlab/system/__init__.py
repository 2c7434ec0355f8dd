"""Access to the machine: whole files, hashes, memory, signals, the terminal."""
