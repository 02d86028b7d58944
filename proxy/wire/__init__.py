"""Bytes to meaning and back. Nothing here reads a clock, opens a file or waits: bytes in, bytes or values out."""
