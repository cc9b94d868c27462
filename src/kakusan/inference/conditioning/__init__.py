"""Conditioning: tilts of a process towards what was seen, and paths drawn with them."""
