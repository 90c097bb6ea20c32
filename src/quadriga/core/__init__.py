"""The language: plain values that every other part speaks. Standard library and torch only."""
