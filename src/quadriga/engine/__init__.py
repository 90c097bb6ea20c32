"""Where trials run: the engines behind one interface, and the store that keeps what they found."""
