"""Decisions without effects: values in, a decision out. Nothing here waits, reads a clock or touches the network."""
