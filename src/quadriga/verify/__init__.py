"""Whether a finished model keeps its promise: equal outputs, kept quality, real compression."""
