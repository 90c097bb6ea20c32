"""Where trials run: a pool of local processes, and the store that keeps what they found."""
