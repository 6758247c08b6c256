"""The detector, the ranked boxes, the module S, and their files."""
