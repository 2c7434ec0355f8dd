"""What touches the machine: whole files, hashes, memory, signals, the terminal."""
